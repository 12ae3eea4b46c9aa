"""Tensor names of older and newer releases of diffusers and transformers, in one spelling."""

import re

# The prefix of CLIP's towers in transformers. Releases differ (5.x drops it from the text tower), so names
# are compared without it; every release reads files that have it.
_TOWER_PATTERN = re.compile(r"^(text_model|vision_model)\.")

# The VAE's attention in files of diffusers before 0.18.
_OLD_ATTENTION_PATTERN = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_IGNORED_PATTERN = re.compile(r"(^|\.)position_ids$")


def canonical_name(name):
    """Return the canonical spelling of a tensor's name; None if the tensor is not a weight."""
    if _IGNORED_PATTERN.search(name):
        return None
    name = _TOWER_PATTERN.sub("", name)
    return _OLD_ATTENTION_PATTERN.sub(lambda match: match[1] + _OLD_ATTENTION[match[2]], name)
