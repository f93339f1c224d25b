"""The laboratory: what train.py and the experiments stand on. Nobody needs it to understand an encoding."""
