"""Measures the kernels of `keras_sd.kernels` against what the backend computes by itself, on a processor.

Each row is one shape near a threshold of a kernel: the processor time of the kernel over that of the backend,
and whether the kernel is chosen there. Both are compiled by XLA, unless a row says "without XLA". They run in
turns; the ratio is that of the medians. The thresholds cite the table, benchmarks/kernels.md:

    KERAS_BACKEND=tensorflow python tools/bench_kernels.py > tensorflow.md
    KERAS_BACKEND=jax python tools/bench_kernels.py > jax.md
"""

import statistics
import time

import keras
import numpy as np

from keras_sd import backend
from keras_sd.kernels import chunked_attention, gemm_gradients, im2col, winograd

REPEATS = 9

# Batch, side of the map, channels in, channels out, side of the kernel.
WINOGRAD = [
    *((1, 128, width, width, 3) for width in (64, 96, 128, 160, 256, 512)),
    *((1, side, 512, 512, 3) for side in (32, 64)),
    (1, 256, 128, 128, 3),
    (1, 256, 256, 256, 3),
]
IM2COL = [
    *((batch, 8, 1280, 1280, 3) for batch in (1, 4, 16, 32)),
    *((batch, 16, 640, 640, 3) for batch in (1, 4)),
    *((4, 8, width, width, 3) for width in (64, 128, 256, 512)),
    (1, 32, 320, 320, 3),
    *((1, side, 320, 320, 1) for side in (16, 64)),
]
IM2COL_WITHOUT_XLA = [
    *((1, 4, width, width, 3) for width in (320, 640)),
    *((batch, 4, 2560, 1280, 3) for batch in (1, 2)),
    *((1, 8, width, 1280, 3) for width in (640, 1280, 1920, 2560)),
    *((batch, 8, 640, 1280, 3) for batch in (2, 4)),
    *((batch, 8, 2560, 1280, 3) for batch in (8, 16)),
    *((batch, 16, 1280, 1280, 3) for batch in (1, 2, 4, 8)),
    (2, 16, 2560, 1280, 3),
    (1, 16, 640, 640, 3),
    (1, 32, 960, 640, 3),
    (1, 64, 320, 320, 3),
    *((1, side, 2560, 1280, 1) for side in (4, 16)),
    (1, 32, 640, 640, 1),
]
GRADIENTS = [
    *((batch, 8, 1280, 1280, 3) for batch in (1, 4, 32)),
    *((batch, 16, 1280, 1280, 3) for batch in (1, 4)),
    *((1, side, 640, 640, 3) for side in (16, 32)),
    *((1, side, 320, 320, 3) for side in (32, 64)),
    (4, 8, 256, 256, 3),
    (16, 8, 256, 256, 3),
    (1, 8, 1280, 1280, 1),
]
# Batch, tokens, heads, size of a head; and MiB of scores that are held at a time.
ATTENTION = [(1, 4096, 8, 40), (16, 1024, 8, 80)]
SCORES = (4, 16, 64, 256)


def main():
    print(f"| kernel, {keras.backend.backend()} | shape | chosen | its time | backend's | ratio |")
    print("|---|---|---|---|---|---|")
    if keras.backend.backend() == "jax":
        for shape in IM2COL:
            measure_convolution(im2col, shape)
    else:
        for shape in WINOGRAD:
            measure_convolution(winograd, shape)
        for dtype in ("bfloat16", "float32"):
            for shape in IM2COL_WITHOUT_XLA:
                measure_convolution(im2col, shape, dtype, jit_compile=False)
        for shape in ATTENTION:
            measure_attention(*shape)
    for shape in GRADIENTS:
        measure_gradients(shape)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype="float32")


def measure_convolution(kernel, shape, dtype="float32", *, jit_compile=True):
    batch, side, inputs, outputs, size = shape
    arrays = random(batch, side, side, inputs), random(size, size, inputs, outputs) / np.float32(inputs**0.5)
    arrays = [keras.ops.cast(array, dtype) for array in arrays]
    options = ((1, 1), "same")
    chosen = []

    def ours(images, weights):
        chosen.append(kernel.is_faster(images, weights, *options))
        return kernel.convolve(images, weights, *(options if kernel is im2col else ()))

    def plain(images, weights):
        return keras.ops.conv(images, weights, padding="same")

    title = f"{size}x{size}, {inputs} to {outputs} channels, {batch} of {side}x{side}"
    name = kernel.__name__.rpartition(".")[2]
    name = name if jit_compile else f"{name}, without XLA, {dtype}"
    report(name, title, ours, plain, arrays, chosen, jit_compile)


def measure_gradients(shape):
    batch, side, inputs, outputs, size = shape
    arrays = random(batch, side, side, inputs), random(size, size, inputs, outputs) / np.float32(inputs**0.5)
    arrays = (*arrays, random(batch, side, side, outputs))
    for place, by in enumerate(("inputs", "kernel")):
        chosen = []

        def gradient(convolve, place, images, weights, upstream):
            def product(one):
                pair = (one, weights) if place == 0 else (images, one)
                return keras.ops.sum(convolve(*map(keras.ops.convert_to_tensor, pair)) * upstream)

            return backend.value_and_gradient(product, (images, weights)[place])[1]

        def ours(images, weights, upstream, place=place, chosen=chosen):
            chosen.append(gemm_gradients.is_faster(images, weights, (1, 1), "same"))
            return gradient(gemm_gradients.convolve, place, images, weights, upstream)

        def plain(images, weights, upstream, place=place):
            def convolve(images, weights):
                return keras.ops.conv(images, weights, padding="same")

            return gradient(convolve, place, images, weights, upstream)

        title = f"by the {by}: {size}x{size}, {inputs} to {outputs} channels, {batch} of {side}x{side}"
        report("gemm_gradients", title, ours, plain, arrays, chosen)


def measure_attention(batch, tokens, heads, head_size):
    arrays = [random(batch, tokens, heads * head_size) for _ in range(3)]
    usual = chunked_attention.LARGEST_SCORES
    for mebibytes in SCORES:

        def ours(*arrays, mebibytes=mebibytes):
            chunked_attention.LARGEST_SCORES = mebibytes * 2**20
            try:
                return chunked_attention.attention(*arrays, heads)
            finally:
                chunked_attention.LARGEST_SCORES = usual

        def whole(*arrays):
            return ours(*arrays, mebibytes=2**20)

        title = f"{batch} x {tokens} tokens, {heads} heads of {head_size}, {mebibytes} MiB of scores"
        report("chunked_attention", title, ours, whole, arrays, [mebibytes * 2**20 == usual])


def report(name, title, ours, theirs, arrays, chosen, jit_compile=True):
    ours, theirs = (backend.jit(function, jit_compile=jit_compile) for function in (ours, theirs))
    times = {ours: [], theirs: []}
    for repeat in range(REPEATS + 1):
        for function, spent in times.items():
            start = time.process_time()
            keras.ops.convert_to_numpy(keras.ops.cast(function(*arrays), "float32"))
            if repeat:  # the first call compiles
                spent.append(1000 * (time.process_time() - start))
    mine, plain = (statistics.median(spent) for spent in times.values())
    marked = "yes" if chosen[0] else "no"
    print(
        f"| {name} | {title} | {marked} | {mine:.0f} ms | {plain:.0f} ms | {mine / plain:.2f} |", flush=True
    )


if __name__ == "__main__":
    main()
