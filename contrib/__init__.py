"""What people run around the library, by extras: serving, monitoring, deployment, a hand-over to trainers."""
