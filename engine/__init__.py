"""Tasks, the loop, checkpoints: what turns bags and a model into results."""
