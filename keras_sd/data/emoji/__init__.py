"""The data set of the bundled `emoji` model: images, captions, and what the model is measured by."""
