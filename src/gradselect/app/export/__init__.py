"""A trained model for others: on the hub with a model card, or as a GGUF file."""

from .card import model_card
from .exported import ExportedModel, read_exported
from .gguf import export_gguf
from .hub import Upload, export_hub, plan_upload

__all__ = ["ExportedModel", "Upload", "export_gguf", "export_hub", "model_card", "plan_upload", "read_exported"]
