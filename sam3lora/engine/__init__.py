"""The inference engine: adapters in slots, shared image and text features, detections."""
