"""Train the encoder: `accelerate launch train_encoder.py RECIPE [section.key=value ...]`."""

from fixclip_cli.train import launch

if __name__ == "__main__":
    launch("encoder")
