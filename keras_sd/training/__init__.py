"""Training: one module per method, and the loop, losses and callbacks that all methods share.

trainer            the training loop around Keras' `fit()`
settings           the settings that all methods share; rate_factors: learning rates of parts
objectives         a network with its loss
optimizers         AdamW, AdamW8bit, Adafactor, Lion and Prodigy with EMA weights; optimizer_options: settings
offloaded_ema      EMA weights in host memory
callbacks          checkpoints, signals, progress, non-finite losses
checkpoints        training checkpoints that survive a kill; slices: of tensors that processes share
resuming           adapts a checkpoint to changed settings
run_folder         the lock, records and exports of a run folder
logs               metrics.jsonl, sample images; trackers: TensorBoard and wandb
evaluation         samples, KID and CLIP score during training; evaluation_schedule: when
validation         the validation loss
post_hoc_ema       averages whose length is chosen after the run
run_curves         what a run has logged, and what looks wrong with it; run_plot draws it
sample_prompts     files of prompts
encoder            the frozen VAE and text encoder, compiled, batch by batch
encodings          encoded examples in memory, or encoded while a step runs; stored_encodings: on disk
caching            chooses among them
caption_tokenizer  token ids of captions that are drawn anew each time
distribution       several devices and processes; rendezvous connects them, watcher ends all when one ends

text_to_image, lora, consistency (LCM), dreambooth, textual_inversion, autoencoder, contrastive (CLIP),
pixel_ddim, super_resolution: the methods; architectures holds their default networks
"""
