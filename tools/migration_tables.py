"""Writes docs/migration.md: each flag of diffusers' and kohya's training scripts, and what it is here.

    python tools/migration_tables.py

What is said of a flag is what the commands themselves answer (`keras_sd/cli/foreign_flags.py`).
"""

from pathlib import Path

from keras_sd.cli.foreign_flags import FOREIGN_FLAGS
from keras_sd.cli.main import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migration.md"

# The scripts' flags as of October 2026.
SCRIPTS = {
    "diffusers' `train_text_to_image_flax.py`": """
        pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir
        image_column caption_column max_train_samples output_dir cache_dir seed resolution center_crop
        random_flip train_batch_size num_train_epochs max_train_steps learning_rate scale_lr
        lr_scheduler adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub
        hub_token hub_model_id logging_dir report_to mixed_precision local_rank from_pt
    """,
    "diffusers' `train_text_to_image_lora.py`": """
        pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir
        image_column caption_column max_train_samples output_dir cache_dir seed resolution center_crop
        random_flip train_batch_size num_train_epochs max_train_steps learning_rate scale_lr
        lr_scheduler adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub
        hub_token hub_model_id logging_dir report_to mixed_precision local_rank validation_prompt
        num_validation_images validation_epochs dataloader_num_workers lr_warmup_steps snr_gamma
        use_8bit_adam allow_tf32 gradient_accumulation_steps gradient_checkpointing prediction_type
        checkpointing_steps checkpoints_total_limit resume_from_checkpoint
        enable_xformers_memory_efficient_attention noise_offset rank image_interpolation_mode
    """,
    "diffusers' other scripts (`train_text_to_image.py`, DreamBooth, textual inversion)": """
        input_perturbation non_ema_revision validation_prompts dream_training dream_detail_preservation
        use_ema offload_ema foreach_ema tracker_project_name proportion_empty_prompts instance_data_dir
        class_data_dir instance_prompt class_prompt with_prior_preservation prior_loss_weight
        num_class_images sample_batch_size train_text_encoder lr_num_cycles lr_power
        pre_compute_text_embeddings tokenizer_max_length text_encoder_use_attention_mask
        skip_save_text_encoder validation_images class_labels_conditioning validation_scheduler use_dora
        placeholder_token initializer_token learnable_property repeats num_vectors save_steps
        save_as_full_pipeline output_kohya_format lora_alpha lora_dropout
    """,
    "kohya's `train_network.py`, `fine_tune.py`, `train_db.py`": """
        v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir train_data_dir
        cache_info shuffle_caption caption_separator caption_extension caption_extention keep_tokens
        keep_tokens_separator secondary_separator enable_wildcard caption_prefix caption_suffix
        color_aug flip_aug face_crop_aug_range random_crop debug_dataset resolution cache_latents
        vae_batch_size cache_latents_to_disk skip_cache_check enable_bucket min_bucket_reso
        max_bucket_reso bucket_reso_steps bucket_no_upscale resize_interpolation token_warmup_min
        token_warmup_step alpha_mask dataset_class caption_dropout_rate caption_dropout_every_n_epochs
        caption_tag_dropout_rate reg_data_dir in_json dataset_repeats output_dir output_name
        huggingface_repo_id save_precision save_every_n_epochs save_every_n_steps save_n_epoch_ratio
        save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_state
        save_state_on_train_end resume train_batch_size max_token_length mem_eff_attn torch_compile
        dynamo_backend xformers sdpa vae max_train_steps max_train_epochs max_data_loader_n_workers
        persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps
        mixed_precision full_fp16 full_bf16 fp8_base ddp_timeout clip_skip logging_dir log_with
        log_prefix log_tracker_name wandb_run_name log_tracker_config wandb_api_key log_config
        noise_offset noise_offset_random_strength multires_noise_iterations ip_noise_gamma
        ip_noise_gamma_random_strength multires_noise_discount adaptive_noise_scale zero_terminal_snr
        min_timestep max_timestep loss_type huber_schedule huber_c huber_scale lowram highvram
        sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts sample_sampler
        config_file output_config optimizer_type use_8bit_adam use_lion_optimizer learning_rate
        max_grad_norm optimizer_args lr_scheduler_type lr_scheduler_args lr_scheduler lr_warmup_steps
        lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power fused_backward_pass
        lr_scheduler_timescale lr_scheduler_min_lr_ratio dataset_config min_snr_gamma
        scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss weighted_captions
        prior_loss_weight conditioning_data_dir masked_loss no_metadata save_model_as unet_lr
        text_encoder_lr fp8_base_unet network_weights network_module network_dim network_alpha
        network_dropout network_args network_train_unet_only network_train_text_encoder_only
        training_comment dim_from_weights scale_weight_norms base_weights base_weights_multiplier
        no_half_vae skip_until_initial_step initial_epoch initial_step validation_seed validation_split
        validate_every_n_steps validate_every_n_epochs max_validation_steps metadata_title
        metadata_author metadata_description metadata_license metadata_tags prompt_template_embedding
        train_text_encoder learning_rate_te diffusers_xformers stop_text_encoder_training
    """,
}

# What has the same name here and another meaning.
DIFFERENT = {
    "--cache-dir": "the folder of encodings; the hub's files are where `HF_HOME` says",
    "--resolution": "the same; squares unless there are buckets",
    "--logging-dir": FOREIGN_FLAGS["--logging-dir"],
    "--train-batch-size": "the same, of all devices together",
    "--mixed-precision": "the same; `auto` by default",
    "--save-every-n-steps": "the same, of checkpoints; the last --checkpoints-total-limit are kept",
    "--save-every-n-epochs": "the same, of checkpoints; the last --checkpoints-total-limit are kept",
    "--dim-from-weights": "the same, of files with one rank, and of all that keras-sd has written",
    "--max-grad-norm": "the same; 0 clips nothing",
}

HEAD = """# Coming from other trainers

Three short guides, and then each flag of other trainers' scripts with what it is here. Underscores are read
as hyphens, and a flag that has another name is answered by the command in the same words.
`python tools/migration_tables.py` writes this page. Two shorter tables tell what to use for a purpose: of
[data](data.md#coming-from-kohyas-scripts-or-diffusers) and of
[training](finetuning.md#coming-from-kohyas-scripts-or-diffusers). A TOML file of options is read by
`--config-file`, and one of data sets by `--dataset-config`.

## From diffusers' Flax scripts

Give the flags of `train_text_to_image_flax.py` to our command, on the JAX backend:

```bash
KERAS_BACKEND=jax python -m keras_sd.train text-to-image --pretrained_model_name_or_path=sd-1.5 \\
    --train_data_dir=images --resolution=512 --center_crop --random_flip --train_batch_size=8 \\
    --mixed_precision=bf16 --max_train_steps=15000 --learning_rate=1e-5 --max_grad_norm=1 \\
    --output_dir=runs/mine
```

- `--train_batch_size` is that of all devices together; there it is that of each device.
- Several devices share the batch with `--distribution data`; there they always do.
- The model that is written has EMA weights. `keras-sd export runs/mine/checkpoint-15000 mine --weights raw`
  writes the others.
- `runs/mine/model` is a diffusers folder with safetensors, for PyTorch's pipelines as well.

## From kohya's scripts

Folders such as `10_cat` and `.caption` files are read as they are. A LoRA of rank 16, with buckets:

```bash
python -m keras_sd.train lora --pretrained-model-name-or-path v1-5-pruned-emaonly.safetensors \\
    --train-data-dir images --rank 16 --lora-alpha 8 --resolution 512 --enable-bucket --train-batch-size 2 \\
    --max-train-epochs 10 --learning-rate 1e-4 --optimizer-type adamw8bit --output-dir runs/cat
```

- `runs/cat/model/lora_kohya.safetensors` is for A1111, ComfyUI and kohya's scripts. `--lora` of our commands
  takes it, too.
- The UNet alone is trained, unless you give `--train-text-encoder`.
- kohya's TOML file of data sets is read by `--dataset-config`.

## From KerasCV

Change the import line to `import keras_sd.keras_cv as keras_cv`, and `from keras_cv.models` to
`from keras_sd.keras_cv.models`. Images differ a little from KerasCV's, whose GELU and normalisations depart
from Stable Diffusion's. New code is better off with `keras_sd.StableDiffusion`, which has more tasks,
samplers and sizes. KerasCV's H5 files are read by `keras-sd convert`.
"""


def flags_of_training():
    """Return flag -> the training commands that have it."""
    found = {}
    for name, command in cli.commands["train"].commands.items():
        for parameter in command.params:
            for flag in (*parameter.opts, *parameter.secondary_opts):
                found.setdefault(flag, []).append(name)
    return found


def meaning(flag, own):
    """Return what stands in the table for a flag of another script."""
    if flag in DIFFERENT:
        return DIFFERENT[flag]
    if flag not in own:
        return FOREIGN_FLAGS[flag]
    return "the same" if len(own[flag]) > 1 else f"the same, of `{own[flag][0]}`"


def page():
    """Return the page as text."""
    own = flags_of_training()
    parts = [HEAD]
    for script, names in SCRIPTS.items():
        parts.append(f"## {script[0].upper()}{script[1:]}\n\n| flag | here |\n|---|---|")
        for name in sorted(names.split()):
            flag = f"--{name.replace('_', '-')}"
            told = meaning(flag, own).replace("|", "\\|")
            parts[-1] += f"\n| `--{name}` | {told} |"
        parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
