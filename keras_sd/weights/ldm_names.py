"""Translates tensor names between latent-diffusion (CompVis, StabilityAI) and diffusers.

latent-diffusion numbers all blocks consecutively; diffusers names them by level and layer. A dictionary of
modules is built for the number of levels and layers. Names inside a module are the same in both, so a tensor
is renamed by the longest prefix of its name that is a module. The inverted dictionary translates back.
"""

import re

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

_MOST_INDICES = 100
_DOWNSAMPLER_PATTERN = re.compile(r"input_blocks\.\d+\.0\.op\.weight")
_VAE_PROJECTION_PATTERN = re.compile(r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def index_count(names, prefix):
    """Return the number of distinct indices after a prefix; at most 100, as a file may be damaged."""
    indices = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return min(len(indices), _MOST_INDICES)


def unet_to_diffusers(tensors):
    """Return a UNet's tensors under diffusers' names; unknown tensors keep their names.

    Args:
        tensors: dictionary of arrays by latent-diffusion's names, without `model.diffusion_model.`.
    """
    levels = 1 + sum(bool(_DOWNSAMPLER_PATTERN.fullmatch(name)) for name in tensors)
    layers = index_count(tensors, "input_blocks.") // levels - 1
    starts = [level * (layers + 1) for level in range(levels)]
    attends = [f"output_blocks.{start}.1.norm.weight" in tensors for start in starts]
    return _rename(tensors, inverted(_unet_modules(levels, layers, attends)))


def unet_to_ldm(tensors, config):
    """Return a UNet's tensors under latent-diffusion's names, without `model.diffusion_model.`.

    Args:
        tensors: dictionary of arrays by diffusers' names.
        config: the dictionary of its `config.json`.
    """
    attends = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]
    return _rename(tensors, _unet_modules(len(attends), config["layers_per_block"], attends))


def vae_to_diffusers(tensors):
    """Return a VAE's tensors under diffusers' names; the attention's 1 x 1 convolutions become linear layers.

    Args:
        tensors: dictionary of arrays by latent-diffusion's names, without `first_stage_model.`.
    """
    levels, layers = index_count(tensors, "decoder.up."), index_count(tensors, "decoder.up.0.block.") - 1
    renamed = _rename(tensors, inverted(_vae_modules(levels, layers)))
    return {
        name: array[..., 0, 0]
        if array.shape[2:] == (1, 1) and _VAE_PROJECTION_PATTERN.search(name)
        else array
        for name, array in renamed.items()
    }


def vae_to_ldm(tensors, config):
    """Return a VAE's tensors under latent-diffusion's names; the attention becomes 1 x 1 convolutions.

    Args:
        tensors: dictionary of arrays by diffusers' names.
        config: the dictionary of its `config.json`.
    """
    convolutions = {
        name: array[:, :, None, None] if array.ndim == 2 and _VAE_PROJECTION_PATTERN.search(name) else array
        for name, array in tensors.items()
    }
    return _rename(convolutions, _vae_modules(len(config["block_out_channels"]), config["layers_per_block"]))


def _unet_modules(levels, layers, up_attends):
    """Return a dictionary from diffusers' modules of a UNet to latent-diffusion's.

    Args:
        levels: number of resolutions.
        layers: residual blocks per level of the down path; the up path has one more.
        up_attends: for each level of the up path, from the coarsest, whether it has cross-attention.
    """
    modules = _UNET_ENDS | {"mid_block.attentions.0": "middle_block.1"}
    modules |= _inside("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    modules |= _inside("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)
    for level, attends in enumerate(up_attends):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        start = level * (layers + 1)
        for layer in range(layers):
            block = f"input_blocks.{start + layer + 1}"
            modules |= _inside(f"{down}.resnets.{layer}", f"{block}.0", _UNET_RESNET)
            modules[f"{down}.attentions.{layer}"] = f"{block}.1"
        modules[f"{down}.downsamplers.0.conv"] = f"input_blocks.{start + layers + 1}.0.op"
        for layer in range(layers + 1):
            block = f"output_blocks.{start + layer}"
            modules |= _inside(f"{up}.resnets.{layer}", f"{block}.0", _UNET_RESNET)
            if attends:
                modules[f"{up}.attentions.{layer}"] = f"{block}.1"
        # The last block of a level ends with the upsampler: module 2, or 1 without attention.
        modules[f"{up}.upsamplers.0"] = f"output_blocks.{start + layers}.{2 if attends else 1}"
    return modules


def _vae_modules(levels, layers):
    """Return a dictionary from diffusers' modules of a VAE to latent-diffusion's.

    latent-diffusion's decoder counts from the finest level.
    """
    modules = {}
    for half in ("encoder", "decoder"):
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        modules |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        for index in range(2):
            block = f"{half}.mid.block_{index + 1}"
            modules |= _inside(f"{half}.mid_block.resnets.{index}", block, _VAE_RESNET)
    for level in range(levels):
        down, ldm_down = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        up, ldm_up = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(layers + 1):
            modules |= _inside(f"{down}.resnets.{layer}", f"{ldm_down}.block.{layer}", _VAE_RESNET)
            modules |= _inside(f"{up}.resnets.{layer}", f"{ldm_up}.block.{layer}", _VAE_RESNET)
        modules[f"{down}.downsamplers.0"] = f"{ldm_down}.downsample"
        modules[f"{up}.upsamplers.0"] = f"{ldm_up}.upsample"
    return modules


def _inside(module, ldm_module, children):
    return {f"{module}.{child}": f"{ldm_module}.{ldm_child}" for child, ldm_child in children.items()}


def inverted(modules):
    """Return the dictionary from values to keys."""
    return {value: key for key, value in modules.items()}


def _rename(tensors, modules):
    return {_renamed(name, modules): array for name, array in tensors.items()}


def _renamed(name, modules):
    end = len(name)
    while (end := name.rfind(".", 0, end)) > 0:
        if name[:end] in modules:
            return modules[name[:end]] + name[end:]
    return name
