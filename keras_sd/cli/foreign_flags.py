"""Flags of diffusers' and kohya's scripts that have another name here or do not exist, and what to use."""

import re
from collections.abc import Container

_RENAMED = re.compile(r"is called (--[a-z-]+) here")
_SIZES = "the sizes of buckets are fixed; --aspect-ratio-buckets sets their number"
_BLOCKS = "use --learning-rate-by-block, with factors of blocks by their names"
_SCHEDULE = (
    "the result holds no noise schedule; set rescale_betas_zero_snr in the model's scheduler_config.json"
)
_SAVING = "use --checkpointing-steps, or --checkpointing-epochs"
_SAMPLES = "use --evaluation-steps, in updates"
_LOGS = "leave it out; logs for TensorBoard are always in the run folder, --output-dir"
_ATTENTION = "XLA compiles attention; leave it out"
_THREADS = "threads read images; leave it out"
_FROM_MODEL = "is read from the model; leave it out"
_FORMAT = "leave it out; `keras-sd convert` writes other formats"
_UPLOAD = "nothing is uploaded; leave it out"
_PRECISION = "use --mixed-precision"

_REVISION = "fetch that revision, and give its folder as --pretrained-model-name-or-path"
_COMPILED = "XLA compiles the step; leave it out"
_MEMORY = "use the flags of memory, such as --gradient-checkpointing"
_STATE = "every checkpoint can be resumed; leave it out"
_RESUMED = "use --resume-from-checkpoint"
_WRITTEN = "captions are taken as they are written; write it into them"
_SQUARED = "the loss is the squared error; leave it out"

FOREIGN_FLAGS = {
    "--network-dim": "is called --rank here",
    "--network-alpha": "is called --lora-alpha here",
    "--network-module": "leave it out; --adapter lokr trains LoKr, and --use-dora DoRA",
    "--network-args": "use --conv-rank, --conv-alpha, --lokr-factor, --rank-by-block and --alpha-by-block",
    "--network-train-unet-only": "is the default; leave it out",
    "--network-weights": "is called --lora-weights here",
    "--dim-from-weights": "this method trains no LoRA; leave it out",
    "--min-snr-gamma": "is called --snr-gamma here",
    "--debiased-estimation-loss": "is called --debiased-estimation here",
    "--unet-lr": "is called --learning-rate here",
    "--learning-rate-te": "is called --text-encoder-lr here",
    "--block-lr": _BLOCKS,
    "--down-lr-weight": _BLOCKS,
    "--mid-lr-weight": _BLOCKS,
    "--up-lr-weight": _BLOCKS,
    "--block-lr-zero-threshold": _BLOCKS,
    "--text-encoder-lr": "this method does not train the text encoder; leave it out",
    "--train-text-encoder": "this method does not train the text encoder; leave it out",
    "--scale-lr": "give the product as --learning-rate",
    "--lr-scheduler-num-cycles": "is called --lr-num-cycles here",
    "--lr-scheduler-power": "is called --lr-power here",
    "--optimizer-args": "each option has a flag of its own, such as --prodigy-d-coef",
    "--zero-terminal-snr": _SCHEDULE,
    "--rescale-betas-zero-snr": _SCHEDULE,
    "--output-config": "leave it out; a run writes `options.toml` into its --output-dir",
    "--save-model-as": _FORMAT,
    "--save-precision": _FORMAT,
    "--output-name": "leave it out; the result is in the folder `model` of --output-dir",
    "--log-with": "is called --report-to here",
    "--log-tracker-name": "is called --tracker-project-name here",
    "--wandb-api-key": "set WANDB_API_KEY, or run `wandb login`",
    "--logging-dir": _LOGS,
    "--validation-prompt": "is called --validation-prompts here",
    "--sample-prompts": "is called --validation-prompts-file here",
    "--validation-epochs": _SAMPLES,
    "--validation-steps": "this method has no validation loss; use --evaluation-steps, in updates",
    "--validate-every-n-steps": "is called --validation-steps here",
    "--validate-every-n-epochs": "use --validation-steps, the number of updates between two validations",
    "--max-validation-steps": "is called --validation-examples here, in images",
    "--validation-seed": "noise and timesteps of validation follow from --seed; leave it out",
    "--sample-every-n-steps": _SAMPLES,
    "--sample-every-n-epochs": _SAMPLES,
    "--use-ema": "the EMA is always kept; set it by --ema-decay",
    "--xformers": _ATTENTION,
    "--sdpa": _ATTENTION,
    "--mem-eff-attn": _ATTENTION,
    "--enable-xformers-memory-efficient-attention": _ATTENTION,
    "--full-fp16": _PRECISION,
    "--full-bf16": _PRECISION,
    "--v2": _FROM_MODEL,
    "--v-parameterization": _FROM_MODEL,
    "--dataloader-num-workers": _THREADS,
    "--max-data-loader-n-workers": _THREADS,
    "--persistent-data-loader-workers": _THREADS,
    "--push-to-hub": _UPLOAD,
    "--hub-model-id": _UPLOAD,
    "--hub-token": _UPLOAD,
    "--reg-data-dir": "use --class-data-dir of `train dreambooth`",
    "--min-bucket-reso": _SIZES,
    "--max-bucket-reso": _SIZES,
    "--bucket-reso-steps": _SIZES,
    "--masked-loss": "give --mask-data-dir or --alpha-mask, which mean it",
    "--conditioning-data-dir": "is called --mask-data-dir here",
    "--random-crop": "use --no-center-crop with --cache-latents off",
    "--flip-aug": "is called --random-flip here",
    "--color-aug": "colours are not changed; leave it out",
    "--face-crop-aug-range": "faces are not searched; crop the images beforehand",
    "--cache-latents-to-disk": "use --cache-latents disk",
    "--vae-batch-size": "leave it out; images are encoded in batches of 4",
    "--caption-dropout-rate": "is called --proportion-empty-prompts here",
    "--caption-dropout-every-n-epochs": "use --proportion-empty-prompts",
    "--in-json": "write metadata.jsonl or metadata.csv into --train-data-dir",
    # Files, logs and devices.
    "--model": "is called --pretrained-model-name-or-path here",
    "--revision": _REVISION,
    "--non-ema-revision": _REVISION,
    "--variant": "files of any precision are read; leave it out",
    "--from-pt": "files of PyTorch and of safetensors are read; leave it out",
    "--tokenizer-cache-dir": "the tokenizer is the model's; leave it out",
    "--vae": "use --pretrained-vae of `train text-to-image`, or a model with that VAE",
    "--local-rank": "is called --process-id here",
    "--ddp-timeout": "is called --coordinator-timeout here",
    "--torch-compile": _COMPILED,
    "--dynamo-backend": _COMPILED,
    "--diffusers-xformers": _ATTENTION,
    "--allow-tf32": "multiplications follow the backend's own setting; leave it out",
    "--fp8-base": _PRECISION,
    "--fp8-base-unet": _PRECISION,
    "--no-half-vae": "latents that are not finite are refused; if so, use --mixed-precision no",
    "--lowram": _MEMORY,
    "--highvram": _MEMORY,
    "--fused-backward-pass": _MEMORY,
    "--foreach-ema": "the EMA is part of the compiled step; leave it out",
    "--log-prefix": _LOGS,
    "--log-config": "the options are in `options.toml` of --output-dir; leave it out",
    "--log-tracker-config": _LOGS,
    "--huggingface-repo-id": _UPLOAD,
    # Checkpoints.
    "--save-steps": "is called --checkpointing-steps here",
    "--save-state": _STATE,
    "--save-state-on-train-end": _STATE,
    "--save-n-epoch-ratio": _SAVING,
    **dict.fromkeys(
        (
            *("--save-last-n-epochs", "--save-last-n-steps"),
            *("--save-last-n-epochs-state", "--save-last-n-steps-state"),
        ),
        "use --checkpoints-total-limit",
    ),
    "--resume": "is called --resume-from-checkpoint here",
    "--skip-until-initial-step": _RESUMED,
    "--initial-epoch": _RESUMED,
    "--initial-step": _RESUMED,
    "--skip-save-text-encoder": "the whole model is written; leave it out",
    "--save-as-full-pipeline": "the vectors are written, and the model stays as it is; leave it out",
    "--output-kohya-format": "both formats are written; leave it out",
    # Captions and images.
    "--cache-info": "what was checked is remembered; leave it out",
    "--skip-cache-check": "encodings are found by their content; leave it out",
    "--debug-dataset": "use `keras-sd dataset FOLDER`",
    "--dataset-class": "use a folder, or the `datasets` library by --dataset-name",
    "--dataset-repeats": "name folders 10_name, or use num_repeats in a file of --dataset-config",
    "--repeats": "use --max-train-steps or --num-train-epochs",
    "--resize-interpolation": "is called --interpolation here",
    "--image-interpolation-mode": "is called --interpolation here",
    "--caption-extention": "is called --caption-extension here",
    "--caption-prefix": _WRITTEN,
    "--caption-suffix": _WRITTEN,
    "--keep-tokens-separator": "use --keep-tokens",
    "--secondary-separator": _WRITTEN,
    "--enable-wildcard": _WRITTEN,
    "--token-warmup-min": "all tags are there from the first step; leave it out",
    "--token-warmup-step": "all tags are there from the first step; leave it out",
    "--weighted-captions": "captions have no weights; write them without",
    "--tokenizer-max-length": "is called --max-token-length here",
    "--pre-compute-text-embeddings": "is the default; leave it out",
    "--text-encoder-use-attention-mask": "CLIP's text encoder takes no mask of a caption; leave it out",
    "--class-labels-conditioning": "is of DeepFloyd's models, which are not trained here",
    # Noise, loss and learning rate.
    "--noise-offset-random-strength": "the offset is drawn for each image; use --noise-offset",
    "--adaptive-noise-scale": "the offset does not follow the latents; use --noise-offset",
    "--ip-noise-gamma": "is called --input-perturbation here",
    "--ip-noise-gamma-random-strength": "the scale is fixed; use --input-perturbation",
    "--min-timestep": "all timesteps are drawn; use --timestep-sampling for more of the middle ones",
    "--max-timestep": "all timesteps are drawn; use --timestep-sampling for more of the middle ones",
    "--loss-type": _SQUARED,
    "--huber-schedule": _SQUARED,
    "--huber-scale": _SQUARED,
    "--scale-v-pred-loss-like-noise-pred": "use --snr-gamma, or --debiased-estimation",
    "--v-pred-like-loss": "use --snr-gamma, or --debiased-estimation",
    "--dream-training": "is not there; leave it out",
    "--dream-detail-preservation": "is not there; leave it out",
    "--use-lion-optimizer": "use --optimizer lion",
    "--lr-scheduler-type": "use --lr-scheduler",
    "--lr-scheduler-args": "use --lr-num-cycles or --lr-power",
    "--lr-decay-steps": "the learning rate falls until the last step; leave it out",
    "--lr-scheduler-timescale": "use --lr-scheduler",
    "--lr-scheduler-min-lr-ratio": "the learning rate falls to 0; leave it out",
    "--validation-scheduler": "samples are made by the model's own sampler; leave it out",
    "--sample-sampler": "samples are made by the model's own sampler; leave it out",
    # What is trained.
    "--network-dropout": "updates have no dropout; leave it out",
    "--lora-dropout": "updates have no dropout; leave it out",
    "--scale-weight-norms": "updates are not scaled down; lower the learning rate",
    "--network-train-text-encoder-only": "the UNet is always trained; use --text-encoder-lr",
    "--stop-text-encoder-training": "the text encoder is trained to the end; use --text-encoder-lr",
    "--prompt-template-embedding": "is not there; leave it out",
    "--base-weights": "merge it first, by `keras-sd lora merge`",
    "--base-weights-multiplier": "merge it first, by `keras-sd lora merge`",
    **dict.fromkeys(
        (
            *("--no-metadata", "--training-comment", "--metadata-title", "--metadata-author"),
            *("--metadata-description", "--metadata-license", "--metadata-tags"),
        ),
        "the header tells how the LoRA was trained, and its trigger words; write the rest into a model card",
    ),
}
"""Flag with hyphens -> what to use here, or why there is none. Commands answer with it in one line."""


def answer_to(flag: str, known: Container[str]) -> str | None:
    """Return what a command answers to a flag of other scripts; None where it has nothing to say.

    Args:
        flag: the flag, with hyphens.
        known: the command's own flags.
    """
    answer = FOREIGN_FLAGS.get(flag)
    renamed = None if answer is None else _RENAMED.match(answer)
    return None if renamed is not None and renamed[1] not in known else answer
