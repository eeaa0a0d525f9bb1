"""Generate completions with a local model, or with a server that speaks the OpenAI protocol."""

from divergence_lens.generation.generating import generate
from divergence_lens.generation.server import Server

__all__ = ["Server", "generate"]
