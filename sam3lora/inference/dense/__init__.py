"""Dense folders asked for labels of images: results, pictures, files."""
