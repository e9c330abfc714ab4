"""Training: the loop of one worker, and launching it with Ray Train. `sam3lora.train` is `training.launch.train`."""
