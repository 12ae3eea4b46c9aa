"""How far a written model is from its source, tensor by tensor and in what its parts compute."""
