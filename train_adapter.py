"""Train the adapter: `accelerate launch train_adapter.py RECIPE [section.key=value ...]`."""

from fixclip_cli.train import launch

if __name__ == "__main__":
    launch("adapter")
