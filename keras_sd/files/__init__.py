"""Files: whole or not at all, JSON within limits, images and what they say of their making."""
