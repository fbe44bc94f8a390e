"""A model folder in words. Knows: manifests, nothing that has to be installed for it."""

from __future__ import annotations

from pathlib import Path

from elis_gateway.predictor import manifest

__all__ = ["describe"]


def describe(folder: Path) -> str:
    """A model folder in words: manifest and figures. Raises ``ConfigError`` where the folder is not sound."""
    made = manifest.load(folder)
    encoder, head = made.encoder, made.head
    size = sum(
        manifest.locate(folder, part).stat().st_size
        for part in (encoder, encoder.tokenizer, head, made.projection)
        if part is not None
    )
    lines = [
        f"{made.name}  ({made.architecture}, made {made.created}; {size / 1e6:.1f} MB with its encoder; files intact)",
        f"  encoder     {encoder.source} ({encoder.licence}), {encoder.pooling} pooling, {encoder.hidden} wide, at most"
        f" {encoder.max_tokens} tokens{', int8' if encoder.quantized else ''}",
        f"  head        {', '.join(head.inputs)} -> {head.output}, in tokens of {head.unit}"
        f"{', int8' if head.quantized else ''}; windows of {made.window}",
        f"  features    {'none' if made.features_version is None else f'version {made.features_version}'}",
        f"  knows       {', '.join(made.models) or 'no served model by name'}",
        "  trained on  " + ("; ".join(f"{s.name} ({s.licence}, {s.answers} answers)" for s in made.sources) or "-"),
        "  versions    " + ", ".join(f"{name} {number}" for name, number in made.versions.items()),
    ]
    lines += [f"  {name:<24} {value:.4g}" for name, value in made.metrics.items()]
    return "\n".join(lines)
