"""A real model and real images, so that the main job runs on a fresh machine."""
