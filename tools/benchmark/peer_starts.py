"""What `tools/bench_start.py` times of diffusers in a process of its own; each mark is a line.

`python -m benchmark.peer_starts TASK FOLDER [SIZE STEPS COUNT] [DTYPE]`, as people write it with diffusers.
"""

import sys

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from benchmark.marks import PROMPT, mark

LORA_RANK = 4


def main(task, folder, size=0, steps=0, count=1, dtype="float32"):
    """Run a task: open, generate, train or train-lora."""
    mark("imported")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=getattr(torch, dtype), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    size, steps, count = int(size), int(steps), int(count)
    if task == "open":
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            sum(float(tensor.sum()) for tensor in part.state_dict().values())
        mark("read")
        return
    mark("opened")
    if task == "generate":
        images = pipeline([PROMPT] * count, height=size, width=size, num_inference_steps=steps).images
        for number, image in enumerate(images):
            image.save(f"image-{number}.png")
    else:
        train(pipeline, size, steps, count, is_lora=task == "train-lora")
    mark("done")


def train(pipeline, size, steps, count, is_lora):
    """Encode images and captions, and train the UNet for some steps of batches of `count`.

    Images are noise: their values change no time.
    """
    images = np.random.default_rng(0).uniform(-1, 1, (steps * count, 3, size, size)).astype("float32")
    with torch.inference_mode():
        encoded = [
            pipeline.vae.encode(torch.from_numpy(image[None])).latent_dist.sample() for image in images
        ]
        ids = pipeline.tokenizer([PROMPT] * count, padding="max_length", return_tensors="pt").input_ids
        context = pipeline.text_encoder(ids)[0]
    latents, context = torch.cat(encoded).clone() * pipeline.vae.config.scaling_factor, context.clone()
    unet = pipeline.unet.train()
    if is_lora:
        from peft import LoraConfig

        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for number in range(steps):
        samples = latents[number * count : (number + 1) * count]
        noise = torch.randn_like(samples)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,))
        noisy = scheduler.add_noise(samples, noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(samples, noise, timesteps) if is_velocity else noise
        prediction = unet(noisy, timesteps, context, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark(f"step {number + 1}, loss {loss.item():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
