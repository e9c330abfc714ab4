"""Search spaces that come with sam3lora: one short YAML file each, for ``sam3lora tune NAME``."""
