"""The groups in which the help of a command shows its options, of tasks and of training methods.

An option of a name that is in no group is shown under "Other options".
"""

import click

FEW = 9
"""So many options, without --help, need no groups."""

_IMAGES = """
    resolution center_crop random_flip interpolation aspect_ratio_buckets enable_bucket bucket_upscale
    on_bad_sample dataset_config_name image_column streaming caption_column caption_extension caption_lines
    alpha_mask mask_data_dir unmasked_weight max_train_samples shuffle_caption keep_tokens caption_separator
    caption_tag_dropout_rate max_token_length
"""

TASKS = {
    "Input": f"split captions images_only {_IMAGES}",
    "Model": """
        model vae loras lora_folder embeddings pretrained_model_name_or_path clip captioner dtype
        mixed_precision cache_dtype batch_size train_batch_size jit_compile engine
        quantize
    """,
    "Sampling": """
        num_images num_frames height width strength noise_level negative_prompt num_inference_steps
        guidance_scale guidance_rescale guidance_interval reuse_interval sampler seed eta clip_skip upscale
        upscaler upscaler_steps
    """,
    "Captions": """
        mode flavors mediums movements artists negative maximum_phrases remove_artists patterns product_type
        introductions keywords maximum_tokens
    """,
    "Devices": "low_memory devices threads num_shards shard_index ray_address ray_workers",
    "Output": "output overwrite frame_rate txt contact_sheet dry_run similarity shown",
}
"""Title -> names of options, of commands that do not train."""

TRAINING = {
    "Input": f"""
        config_file train_data_dir dataset_name dataset_config instance_data_dir instance_prompt
        with_prior_preservation class_prompt class_data_dir num_class_images sample_batch_size crop_size
        factor {_IMAGES} proportion_empty_prompts cache_latents cache_dir cache_dtype
    """,
    "Model": """
        pretrained_model_name_or_path from_scratch unet_config pretrained_vae pretrained_clip vae_config
        text_config image_config tokenizer_folder frozen_text_encoder train_text_encoder decoder_only
        discriminator_width discriminator_depth clip_skip prediction_type rescale_betas_zero_snr
        placeholder_token initializer_token num_vectors learnable_property
    """,
    "LoRA": """
        lora rank lora_alpha conv_rank conv_alpha rank_by_block alpha_by_block adapter lokr_factor use_dora
        use_rslora lora_weights dim_from_weights lora_layers trigger_words
    """,
    "Training": """
        max_train_steps num_train_epochs train_batch_size gradient_accumulation_steps mixed_precision
        jit_compile gradient_checkpointing seed resume_from_checkpoint ema_decay post_hoc_ema offload_ema
    """,
    "Loss": """
        snr_gamma debiased_estimation noise_offset multires_noise_iterations multires_noise_discount
        input_perturbation timestep_sampling log_sigma_mean log_sigma_std prior_loss_weight alignment_weight
        alignment_model loss_type huber_c num_ddim_timesteps kl_weight perceptual_weight perceptual_model
        adversarial_weight adversarial_start
    """,
    "Optimizer": """
        optimizer use_8bit_adam learning_rate text_encoder_lr learning_rate_by_block lr_scheduler
        lr_warmup_steps lr_num_cycles lr_power max_grad_norm adam_beta1 adam_beta2 adam_epsilon
        adam_weight_decay lion_beta1 lion_beta2 adafactor_relative_step adafactor_scale_parameter
        adafactor_warmup_init adafactor_beta1 prodigy_beta3 prodigy_d0 prodigy_d_coef prodigy_growth_rate
        prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup
    """,
    "Validation and sample images": """
        evaluation_steps sample_at_first validation_steps validation_examples validation_split
        validation_prompts validation_prompts_file validation_images num_validation_images guidance_scale
        num_inference_steps kid_images kid inception_weights
    """,
    "Devices": "plan distribution coordinator num_processes process_id coordinator_timeout",
    "Output": """
        output_dir checkpointing_steps checkpointing_epochs checkpoints_total_limit report_to
        tracker_project_name wandb_run_name
    """,
}
"""Title -> names of options, of training methods."""

OTHER = "Other options"


def grouped(parameters):
    """Return title -> options of a command, in the order of the groups and, within one, of the command."""
    options = [one for one in parameters if isinstance(one, click.Option) and not one.hidden]
    if len(options) <= FEW + 1:
        return {"Options": options}
    groups = TRAINING if any(one.name == "max_train_steps" for one in options) else TASKS
    title_of = {name: title for title, names in groups.items() for name in names.split()}
    found = {title: [] for title in (*groups, OTHER)}
    for option in options:
        found[title_of.get(option.name, OTHER)].append(option)
    return {title: some for title, some in found.items() if some}
