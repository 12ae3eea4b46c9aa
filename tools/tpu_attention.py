"""Compiles attention for a TPU that is not there, and tells what ours and others hold in its memory.

`pip install 'keras_sd[tpu-plan]'` brings the compiler. It takes a minute.
"""

import os

import click

SHAPES = ((1, 4096, 8, 40), (4, 4096, 8, 40), (4, 1024, 8, 80))  # images, tokens, heads, head size in SD 1.5
_TILE = 128  # a kernel of Pallas takes heads of this size
_BLOCK = 512


def chunked(query, key, value):
    """Ours: chunks of the queries, whose scores the gradient computes again."""
    from keras_sd.kernels import chunked_attention

    images, tokens, heads, size = query.shape
    arrays = (array.reshape(images, tokens, heads * size) for array in (query, key, value))
    return chunked_attention.attention(*arrays, heads).reshape(query.shape)


def whole(query, key, value):
    """JAX's, which holds all scores on a TPU."""
    import jax

    return jax.nn.dot_product_attention(query, key, value)


def splash(query, key, value):
    """JAX's flash attention by Pallas, with heads filled up by zeros."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, tokens, heads, size = query.shape
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    blocks = kernel.BlockSizes(**dict.fromkeys(names, _BLOCK))
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    attend = kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    query, key, value = (
        jnp.pad(array.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, -size % _TILE)))
        for array in (query * query.dtype.type(size**-0.5), key, value)
    )
    return jax.vmap(attend)(query, key, value)[..., :size].transpose(0, 2, 1, 3)


@click.command()
@click.argument("topology", default="v5e:1x1")
def tpu_attention(topology):
    """Print a table of what attention and its gradients hold on a chip, as the compiler counts."""
    os.environ["KERAS_BACKEND"] = "jax"
    from keras_sd import backend
    from keras_sd.backend.planning import compile_planned, shapes_of

    os.environ |= backend.tpu_environment()
    import jax
    import jax.numpy as jnp

    plan = backend.start_plan(backend.tpu_devices(topology))

    def gradients(attend):
        return jax.grad(lambda *arrays: attend(*arrays).astype("float32").sum(), argnums=(0, 1, 2))

    for shape in SHAPES:
        arrays = shapes_of([jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3)
        for attend in (whole, chunked, splash):
            for program, what in ((attend, "output"), (gradients(attend), "gradients")):
                title = f"{attend.__name__} | {' x '.join(map(str, shape))} | {what}"
                compile_planned(title, jax.jit(program), *arrays)
    print("| attention | images x tokens x heads x head size | computed | temporaries |\n|---|---|---|---|")
    for program in plan.programs:
        print(f"| {program.title} | {program.memory['temporaries'] / 2**20:.1f} MiB |")


if __name__ == "__main__":
    tpu_attention()
