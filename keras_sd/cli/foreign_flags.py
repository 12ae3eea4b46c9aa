"""Flags of diffusers' and kohya's scripts that have another name here or do not exist, and what to use."""

_SIZES = "the sizes of buckets are fixed; --aspect-ratio-buckets sets their number"
_BLOCKS = "use --learning-rate-by-block, with factors of blocks by their names"
_SCHEDULE = (
    "the result holds no noise schedule; set rescale_betas_zero_snr in the model's scheduler_config.json"
)
_SAVING = "use --checkpointing-steps, in updates"
_SAMPLES = "use --evaluation-steps, in updates"
_LOGS = "leave it out; logs for TensorBoard are always in the run folder, --output-dir"
_ATTENTION = "XLA compiles attention; leave it out"
_THREADS = "threads read images; leave it out"
_FROM_MODEL = "is read from the model; leave it out"
_FORMAT = "leave it out; `keras-sd convert` writes other formats"
_UPLOAD = "nothing is uploaded; leave it out"
_PRECISION = "use --mixed-precision"

FOREIGN_FLAGS = {
    "--network-dim": "is called --rank here",
    "--network-alpha": "is called --lora-alpha here",
    "--network-module": "leave it out; `train lora` trains LoRA",
    "--network-args": "leave it out; --lora-layers all adapts convolutions, too",
    "--network-train-unet-only": "is the default; leave it out",
    "--network-weights": "LoRA begins anew; --resume-from-checkpoint continues a run",
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
    "--save-every-n-epochs": _SAVING,
    "--save-every-n-steps": _SAVING,
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
    "--validate-every-n-epochs": "is called --validation-steps here, in updates",
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
}
"""Flag with hyphens -> what to use here, or why there is none. Commands answer with it in one line."""
