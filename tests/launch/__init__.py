"""What schedulers start: supervisor, batch scripts, manifests, images."""
