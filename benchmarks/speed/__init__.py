"""Times and memory of training steps beside Inductor."""
