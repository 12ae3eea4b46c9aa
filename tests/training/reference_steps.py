"""The torch side of `test_gradients`: one step of each method with diffusers, transformers, PEFT and torch.

Losses are put together as diffusers' training scripts do it. The program reads the models and
`settings.json` from its folder, and of each case

- `CASE/batch/NAME`: what is random in the step, channels last;
- `CASE/added/PART.NAME`: LoRA's tensors, or the vectors of new tokens.

It gives `CASE/loss` and `CASE/gradients/PART.NAME`, and `adamw/weights/STEP`.
"""

SCRIPT = """
    import copy, json, re
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LCMScheduler, UNet2DConditionModel
    from diffusers.training_utils import compute_snr
    from peft import LoKrConfig, LoraConfig
    from torch.nn.functional import mse_loss
    from transformers import CLIPTextModel

    torch.set_grad_enabled(True)
    settings = json.loads((folder / "settings.json").read_text())
    models = {
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder" / "text_encoder"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae" / "vae"),
    }
    for unet in settings["unets"]:
        models[unet] = UNet2DConditionModel.from_pretrained(folder / unet / "unet")


    def group(prefix):
        return {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}


    def published(name):
        name = re.sub(r"\\.default(?=\\.|$)", "", name.removeprefix("text_model."))
        name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        return f"{name}.weight" if name.endswith(("lokr_w2_a", "lokr_w2_b")) else name


    def channels_first(array):
        if array.dtype == torch.uint8:
            array = array.float() / 127.5 - 1
        return array.permute(0, 3, 1, 2) if array.ndim == 4 else array


    def add_lora(model, targets, added, case):
        if case.get("adapter") == "lokr":
            config = LoKrConfig(r=case["rank"], alpha=case["alpha"], target_modules=targets)
        else:
            config = LoraConfig(**settings["lora"], **case.get("options", {}), target_modules=targets)
        model.add_adapter(config)
        updates = {published(name): value for name, value in model.named_parameters()
                   if ".lora_" in name or ".lokr_" in name}
        assert updates.keys() == added.keys(), updates.keys() ^ added.keys()
        with torch.no_grad():
            for name, parameter in updates.items():
                parameter.copy_(added[name].view_as(parameter))


    def add_tokens(text_encoder, vectors):
        text_encoder.resize_token_embeddings(text_encoder.config.vocab_size + len(vectors))
        table = text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[-len(vectors) :] = vectors
        table.requires_grad_(True)


    def prepare(name, case):
        \"\"\"The models of a case, what it trains trainable.\"\"\"
        parts = {"text_encoder": "text_encoder", "vae": "vae", "unet": case.get("unet", "sd1")}
        parts = {part: copy.deepcopy(models[model]) for part, model in parts.items()}
        for part, model in parts.items():
            added = group(f"{name}/added/{part}.")
            model.requires_grad_(part in case["trains"] and not added)
            if "vectors" in added:
                add_tokens(model, added["vectors"])
            elif added:
                add_lora(model, settings["lora_targets"][case["lora"]][part], added, case)
        return parts


    def denoising_loss(case, batch, unet, text_encoder):
        scheduler = DDPMScheduler(**settings["scheduler"] | case.get("scheduler", {}))
        samples, noise, timesteps = batch["samples"], batch["noise"], batch["timesteps"].long()
        noise = noise + case.get("noise_offset", 0) * batch.get("offset_noise", 0)
        input_noise = noise + case.get("input_perturbation", 0) * batch.get("perturbation", 0)
        noisy = scheduler.add_noise(samples, input_noise, timesteps)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(samples, noise, timesteps) if is_velocity else noise
        levels = None
        if "low_resolution" in batch:
            levels = batch["noise_levels"].long()
            low_res_scheduler = DDPMScheduler(**settings["scheduler"] | settings["low_res_scheduler"])
            low = low_res_scheduler.add_noise(batch["low_resolution"], batch["low_resolution_noise"], levels)
            noisy = torch.cat([noisy, low], dim=1)
        if "hidden" in batch:
            noisy = torch.cat([noisy, batch["hidden"], batch["masked_latents"]], dim=1)
        context = text_encoder(batch["token_ids"].long())[0] if "token_ids" in batch else None
        output = unet(noisy, timesteps, context, class_labels=levels).sample
        if "prior_loss_weight" in case:
            (output, prior_output), (target, prior_target) = output.chunk(2), target.chunk(2)
            return mse_loss(output, target) + case["prior_loss_weight"] * mse_loss(prior_output, prior_target)
        errors = (mse_loss(output, target, reduction="none") * batch.get("mask", 1)).mean(dim=(1, 2, 3))
        if "snr_gamma" in case:
            snr = compute_snr(scheduler, timesteps)
            errors = errors * snr.clamp(max=case["snr_gamma"]) / (snr + 1 if is_velocity else snr)
        if "debiased_estimation" in case:
            snr = compute_snr(scheduler, timesteps).clamp(max=1000)
            errors = errors / (snr + 1 if is_velocity else snr.sqrt())
        return errors.mean()


    def consistency_loss(case, batch, unet, text_encoder):
        config = settings["scheduler"] | case.get("scheduler", {})
        ddim = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
        ddim.set_timesteps(case["num_ddim_timesteps"])
        stride = ddim.config.num_train_timesteps // case["num_ddim_timesteps"]
        context, negative = (text_encoder(batch[name].long())[0] for name in ("token_ids", "negative_ids"))
        starts = batch["timesteps"].long()
        ends = (starts - stride).clamp(min=0)
        noisy = ddim.add_noise(batch["samples"], batch["noise"], starts)

        def steps(prediction, timesteps, samples):
            values = zip(prediction, timesteps, samples, strict=True)
            return [ddim.step(*example) for example in values]

        def consistent_sample(samples, timesteps):
            found = steps(unet(samples, timesteps, context).sample, timesteps, samples)
            found = torch.stack([step.pred_original_sample for step in found])
            shares = [LCMScheduler().get_scalings_for_boundary_condition_discrete(t) for t in timesteps]
            skip, out = (torch.stack(share)[:, None, None, None] for share in zip(*shares))
            return skip * samples + out * found

        unet.disable_adapters()
        with torch.no_grad():
            wanted, unwanted = (unet(noisy, starts, states).sample for states in (context, negative))
            guided = unwanted + case["guidance_scale"] * (wanted - unwanted)
            less_noisy = torch.stack([step.prev_sample for step in steps(guided, starts, noisy)])
        unet.enable_adapters()
        with torch.no_grad():
            target = consistent_sample(less_noisy, ends)
        errors = (consistent_sample(noisy, starts) - target).square()
        if "huber_c" in case:
            errors = (errors + case["huber_c"] ** 2).sqrt() - case["huber_c"]
        return errors.mean()


    def autoencoder_loss(case, batch, vae):
        posterior = vae.encode(batch["samples"]).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"]
        errors = vae.decode(latents).sample - batch["samples"]
        divergence = posterior.kl().mean() / batch["noise"][0].numel()
        return errors.abs().mean() + 2 * errors.square().mean() + case["kl_weight"] * divergence


    for name, case in settings["cases"].items():
        batch = group(f"{name}/batch/")
        if "prior_loss_weight" in case:
            batch = {key: torch.cat([pairs[:, 0], pairs[:, 1]]) for key, pairs in batch.items()}
        batch = {key: channels_first(array) for key, array in batch.items()}
        parts = prepare(name, case)
        if "vae" in case["trains"]:
            loss = autoencoder_loss(case, batch, parts["vae"])
        elif "num_ddim_timesteps" in case:
            loss = consistency_loss(case, batch, parts["unet"], parts["text_encoder"])
        else:
            loss = denoising_loss(case, batch, parts["unet"], parts["text_encoder"])
        loss.backward()
        outputs[f"{name}/loss"] = loss
        for part in case["trains"]:
            added = group(f"{name}/added/{part}.")
            for parameter, tensor in parts[part].named_parameters():
                if tensor.requires_grad:
                    key = published(parameter)
                    outputs[f"{name}/gradients/{part}.{key}"] = tensor.grad.reshape(
                        added[key].shape if "lora" in case else tensor.shape)

    weights = torch.nn.Parameter(inputs["adamw/weights"])
    optimizer = torch.optim.AdamW([weights], **settings["adamw"])
    for step, gradient in enumerate(inputs["adamw/gradients"], start=1):
        weights.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([weights], settings["max_grad_norm"])
        optimizer.step()
        outputs[f"adamw/weights/{step}"] = weights.clone()
"""
