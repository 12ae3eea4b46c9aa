"""The one spelling of tensors' names that differ between releases of the libraries that publish them."""

import re

# What transformers puts before the names of CLIP's towers. Releases differ (5.x drops it from the
# text tower), so names are compared without it; each release reads files that have it.
_TOWER_PATTERN = re.compile(r"^(text_model|vision_model)\.")

# The VAE's attention in files written by diffusers before 0.18.
_OLD_ATTENTION_PATTERN = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_IGNORED_PATTERN = re.compile(r"(^|\.)position_ids$")


def canonical_name(name):
    """Return the one spelling under which the names of all releases meet; None for what is no weight."""
    if _IGNORED_PATTERN.search(name):
        return None
    name = _TOWER_PATTERN.sub("", name)
    return _OLD_ATTENTION_PATTERN.sub(lambda match: match[1] + _OLD_ATTENTION[match[2]], name)
