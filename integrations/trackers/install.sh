#!/bin/sh
# $1: python of the environment
set -e
"$1" -m pip install --quiet "torch>=2.11" "transformers>=5.17" accelerate matplotlib pytest tensorboard wandb mlflow trackio
