"""Weights: reads and writes every weight format, and maps tensors to Keras variables.

readers            opens a checkpoint of any format
loading            opens models as Keras models; rules maps tensors to Keras variables, in both directions
diffusers_folder   the diffusers folder, the native format
single_file        single-file checkpoints; ldm_names translates their names
derived_config     derives a config from tensors; expected_shapes checks a config against tensors
keras_cv_h5        KerasCV's H5 files
open_clip          OpenCLIP's and OpenAI's CLIP
lora               reads LoRA files; lora_files: names, lora_strength: scales, lora_updates: kinds
lora_writing       writes them; lora_arithmetic sums and resizes them without a model
textual_inversion  learned embeddings
inception          the published Inception v3 of FID and KID
safetensors_files  safetensors; torch_pickle and stored_zip read torch's files without torch
"""
