"""What the notebooks need around the networks: data, checkpoints, training, timing, pictures, reports."""
