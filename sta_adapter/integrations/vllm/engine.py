"""VLLMEngine: vLLM in the place of a model in `sta_adapter.evaluation.evaluate`, with the prompts and frames of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

from sta_adapter._lazy import importing
from sta_adapter.adapter.base_model import ANY
from sta_adapter.adapter.hub import resolve_adapter
from sta_adapter.adapter.lora_weights import LORA_CONFIG
from sta_adapter.compatibility.releases import incompatible, version
from sta_adapter.data.chat_encoding import Prompt
from sta_adapter.errors import ConfigError, InjectionError, STAError
from sta_adapter.integrations.vllm.export import BASE, STA, export_merged, lora_digest
from sta_adapter.integrations.vllm.frames import clip_facts
from sta_adapter.integrations.vllm.option_scores import MOST_IDS, OptionTree
from sta_adapter.integrations.vllm.request import ADAPTER, ANY_BASE, adapter_digest
from sta_adapter.integrations.vllm.serve_line import check_plugins

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

OWN = ("model", "hf_overrides", "revision", "trust_remote_code", "dtype")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json")


class Source(TypedDict, total=False):
    """Where a base comes from."""

    revision: str | None
    trust_remote_code: bool


class VLLMEngine:
    """VLLM with an adapter, or with a base alone; a context manager, which ends the engine.

    Args:
        model: the base's folder, or its id on the Hub.
        adapter: the adapter's; STA, or STA with LoRA weights, which are merged into a copy of the base for as long as
            the engine runs, in the folder for temporary files.
        adapter_revision: of the adapter on the Hub.
        any_base: take another base than the adapter names, if it fits.
        dtype: "auto" (as saved; fp32 where there is no CUDA), "bf16", "fp16" or "fp32".
        revision: the base's branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the base.
        most: the most clips ("video") and pictures ("image") of a prompt.
        options: further arguments of `vllm.LLM`.

    Raises:
        MissingExtraError: there is no vLLM.
        ConfigError: an option that has an argument here, or `VLLM_PLUGINS` leaves STA out.
        CheckpointError: the adapter isn't available, or is for another base.
        InjectionError: the engine doesn't start.
    """

    def __init__(
        self,
        model: str,
        adapter: str | os.PathLike[str] | None = None,
        *,
        adapter_revision: str | None = None,
        any_base: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        most: Mapping[str, int] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        options = dict(options or {})
        if taken := sorted(set(options) & set(OWN)):
            raise ConfigError(f"the engine's option {taken[0]} has a setting of its own; leave it out of these.")
        with importing("an engine needs vLLM beside sta-adapter ({}): pip install 'sta-adapter[vllm]'."):
            from vllm import LLM
        self._stack = contextlib.ExitStack()
        self._source: Source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._model = model
        self._folder: Path | None = None
        overrides: dict[str, object] = {}
        try:
            if adapter is not None:
                check_plugins(os.environ.get("VLLM_PLUGINS"))
                self._folder = sta = resolve_adapter(adapter, adapter_revision)
                if (sta / LORA_CONFIG).exists():
                    model, sta = self._merged(model, sta, any_base, dtype)
                overrides = {ADAPTER: os.path.abspath(sta), **({ANY_BASE: True} if any_base else {})}
            limits = {kind: max(1, count) for kind, count in (most or {"video": 1, "image": 1}).items()}
            settings = {"limit_mm_per_prompt": limits, "disable_log_stats": True, "seed": 0, "max_logprobs": MOST_IDS}
            self.dtype = DTYPES.get(dtype) or _saved_dtype(model, self._source)
            self._settings = {**settings, **options}
            source: Source = self._source if model == self._model else {}
            self.llm = _start(LLM, model, hf_overrides=overrides, dtype=self.dtype, **source, **self._settings)
            self._stack.callback(self._end)
        except BaseException:
            self._stack.close()
            raise
        self.max_length = int(self.llm.llm_engine.model_config.max_model_len)

    def _merged(self, base: str, adapter: Path, any_base: bool, dtype: str) -> tuple[str, Path]:
        """The base with the adapter's LoRA weights in it and STA alone, in a folder that lasts as long as the engine.

        VLLM's own LoRA for encoders maps the tokens of a whole step, and then encodes pictures and clips apart.
        """
        out = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sta-merged-")))
        any_ = ANY if any_base else None
        export_merged(adapter, out, base, base_model=any_, **self._source, dtype=dtype, device="cpu")
        return str(out / BASE), out / STA

    def __enter__(self) -> VLLMEngine:
        """Itself."""
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        """End the engine, so that its memory is free."""
        self.close()

    def close(self) -> None:
        """End the engine; twice is fine."""
        self._stack.close()

    def _end(self) -> None:
        import gc

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def fingerprint(self) -> dict[str, str]:
        """What every answer depends on: the engine with its settings, the base's files, STA and LoRA weights."""
        folder = self._folder
        has_lora = folder is not None and (folder / LORA_CONFIG).exists()
        return {
            "engine": f"vllm {version('vllm')}, {self.dtype}, {sorted(self._settings.items())}",
            "base": _base_digest(self._model, self._source),
            "sta": "off" if folder is None else adapter_digest(folder),
            "lora": lora_digest(folder) if folder is not None and has_lora else "off",
        }

    def write(self, prompts: Sequence[tuple[Prompt, list[int]]], max_new_tokens: int) -> list[list[int]]:
        """See `sta_adapter.evaluation.engine.Engine`."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=max_new_tokens, detokenize=False)
        outputs = self._generate([(prompt, ids, ()) for prompt, ids in prompts], how)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def log_likelihoods(
        self, prompts: Sequence[tuple[Prompt, list[int]]], options: Sequence[list[list[int]]]
    ) -> list[list[float]]:
        """See `sta_adapter.evaluation.engine.Engine`.

        Each token of an option is scored behind those before it; what options begin with in common is asked once, and
        what prompts have in common is in the engine's cache.
        """
        from vllm import SamplingParams

        tree = OptionTree(options)
        for nodes in tree.rounds():
            how = [
                SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=ids)
                for ids in tree.padded(nodes)
            ]
            outputs = self._generate([(*prompts[node.prompt], node.before) for node in nodes], how)
            for node, output in zip(nodes, outputs, strict=True):
                found = output.outputs[0].logprobs[0]
                tree.tell(node, {token: found[token].logprob for token in node.following})
        return tree.scores()

    def _generate(
        self, asked: Sequence[tuple[Prompt, list[int], tuple[int, ...]]], how: SamplingParams | list[SamplingParams]
    ) -> list[RequestOutput]:
        """What follows prompts with the beginning of an answer behind them, if their tokens are those of transformers."""
        outputs = self.llm.generate([request(prompt, before) for prompt, _, before in asked], how, use_tqdm=False)
        for output, (prompt, ids, before) in zip(outputs, asked, strict=True):
            found, expected = (
                [
                    -1 if token in prompt.placeholders else token for token in tokens
                ]  # vLLM has one kind where we have two
                for tokens in (output.prompt_token_ids, [*ids, *before])
            )
            if found != expected:
                raise incompatible(
                    "vllm",
                    f"vLLM made {len(found)} tokens of a prompt, which are not the {len(expected)} of transformers",
                )
        return list(outputs)


def request(prompt: Prompt, answer: Sequence[int] = ()) -> dict[str, object]:
    """A prompt as `LLM.generate` takes it, with the beginning of an answer behind it."""
    data: dict[str, list[object]] = {}
    for visual in prompt.visuals:
        if visual.kind == "image":
            from PIL import Image

            data.setdefault("image", []).append(Image.fromarray(visual.pixels[0]))
        else:
            data.setdefault("video", []).append((visual.pixels, clip_facts(visual, prompt.temporal_patch)))
    made: dict[str, object] = {"prompt_token_ids": [*prompt.tokens, *answer], "multi_modal_data": data}
    if prompt.settings:
        made["mm_processor_kwargs"] = {"videos_kwargs": dict(prompt.settings)}
    return made


def _start(engine: Callable[..., LLM], model: str, **settings: object) -> LLM:
    """The engine; what ends its start is told as our own error, where that is at its root."""
    try:
        return engine(model=model, **settings)
    except STAError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, STAError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise InjectionError(
            f"vLLM doesn't start with {model!r}: {error}. Its own log above says more; settings: {settings}."
        ) from error


def _saved_dtype(model: str, source: Source) -> str:
    """As transformers' path has it: the dtype that the base was saved in; float32 where there is no CUDA."""
    import torch
    from transformers import AutoConfig

    if not torch.cuda.is_available():
        return "float32"
    config = AutoConfig.from_pretrained(model, **source)
    saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return str(saved).removeprefix("torch.") if saved is not None else "float32"


def _base_digest(model: str, source: Source) -> str:
    """Of the base's weights and settings: its files' contents, or its commit on the Hub."""
    folder = Path(model)
    if not folder.is_dir():
        from transformers import AutoConfig

        commit = getattr(AutoConfig.from_pretrained(model, **source), "_commit_hash", None)
        if commit is None:
            raise ConfigError(
                f"the commit of {model!r} on the Hub is not known, so that it can't be known whether results that are kept "
                "in files are of this base: name a folder, or a --revision."
            )
        return f"{model} {commit}"
    files = sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(_file_digest, files))
    return hashlib.sha256(repr([(f.name, c) for f, c in zip(files, contents, strict=True)]).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while part := opened.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()
