"""Using adapters: the predictor, folders of images, batch jobs on Ray Data, and drawing."""
