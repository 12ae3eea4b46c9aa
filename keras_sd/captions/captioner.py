"""One sentence for an image, by the BLIP model of transformers (Li et al., 2022, arXiv:2201.12086)."""

from pathlib import Path

from keras_sd.errors import UserError, require

_NEW_TOKENS = 32


class Captioner:
    """Describes an image in one sentence.

    Args:
        name: a hub id such as `Salesforce/blip-image-captioning-large`, or a folder of that layout.
        device: torch device: "cpu", "cuda", "cuda:1", ... The model runs in float32 on the CPU and in float16
            elsewhere.

    Raises:
        UserError: transformers is not installed, or the model cannot be opened.
    """

    def __init__(self, name, device="cpu"):
        require("torch", "transformers", instead="use `captioner=None`")
        import torch
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.dtype = torch.float32 if str(device) == "cpu" else torch.float16
        # Never run Python code that comes with the weights; never download for a local folder.
        options = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
        try:
            self._processor = BlipProcessor.from_pretrained(name, **options)
            model = BlipForConditionalGeneration.from_pretrained(
                name, dtype=self.dtype, attn_implementation="eager", weights_only=True, **options
            )
        except (OSError, ValueError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"captioner {name}: cannot be opened ({line}); give a BLIP model, or `captioner=None`"
            ) from error
        self.device = device
        self._model = model.to(device).eval()

    def __call__(self, images):
        """Return one sentence for each of a list of Pillow images."""
        import torch

        inputs = self._processor(images=images, return_tensors="pt").to(self.device, self.dtype)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=_NEW_TOKENS)
        return [text.strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]
