"""A frozen teacher beside the model that is trained, and what a student takes of it."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import transformers

from utils.adapters import carved
from utils.comparison import PRECISIONS
from utils.config import InputError
from utils.divergences import Divergence
from utils.export import by_itself
from utils.files import written_aside
from utils.fragments import gathered
from utils.integrity import write_checksums
from utils.model import ModelArguments, build_model, empty_model, load_tokenizer, model_config
from utils.model_settings import check_not_pickled, quantization
from utils.program import looked_for
from utils.ranks import launched_with, launched_zero_stage


@dataclass
class Teacher:
    """The model that a student learns from; nothing of it is trained."""

    model_name_or_path: str | None = None  # a folder or Hub name
    adapter_name_or_path: str | None = None  # an adapter of this model
    # in place of a path an architecture, initialised by the seed: to try a config out
    model: dict[str, Any] = field(default_factory=dict)
    # of its weights; auto: the precision of mixed_precision. 8bit and 4bit: of its linear layers
    # (LLM.int8, NF4), by bitsandbytes
    dtype: Literal["auto", "float32", "bfloat16", "float16", "8bit", "4bit"] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass
class DistillationArguments(ModelArguments):
    """A smaller student learns from a teacher."""

    tokenizer: str | None = None  # null: that of model_name_or_path, or else of the teacher
    teacher: Teacher = field(default_factory=Teacher)  # required
    # The student: a smaller checkpoint (model_name_or_path), an architecture from scratch (model),
    # or these layers of the teacher, counted from 0, and of its MLPs so many neurons, those of the
    # largest weights.
    student_layers: list[int] | None = None
    student_intermediate_size: int | None = None
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tvd"] = "forward_kl"
    beta: float = 0.5  # of jsd: 0 is forward_kl, 1 is reverse_kl
    temperature: float = 1.0  # of both models' probabilities; the divergence is times its square
    soft_weight: float = 1.0  # of the divergence from the teacher
    hard_weight: float = 0.0  # of the loss of the labels
    hidden_weight: float = 0.0  # of the squared difference of hidden states, by layer_map
    # for each layer of the student the teacher's, counted from 1 (its output; embeddings stand
    # beside embeddings); null: student_layers, or evenly spread
    layer_map: list[int] | None = None
    dry_run: bool = False  # print parameters, FLOPs and memory, and load nothing
    weights: ClassVar[Sequence[str]] = ("soft_weight", "hard_weight", "hidden_weight")

    def check(self) -> None:
        given = self.teacher
        if bool(given.model_name_or_path) == bool(given.model):
            raise InputError("teacher: give its model_name_or_path, or a model from scratch")
        if given.adapter_name_or_path and not given.model_name_or_path:
            raise InputError("teacher.adapter_name_or_path: give model_name_or_path, its base")
        usual = type(self).__dataclass_fields__["model"].default_factory()
        if self.is_carved and (self.model_name_or_path or self.model != usual):
            raise InputError(
                "student_layers: model_name_or_path and model are students of their own: give one"
            )
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be more than 0, not {self.temperature}")
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta must be in [0, 1], not {self.beta}")
        values = {name: getattr(self, name) for name in self.weights}
        for name, value in values.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be 0 or more, not {value}")
        if not any(values.values()):
            raise InputError(f"{', '.join(values)}: all are 0: there is nothing to learn")
        own, path = os.path.realpath(self.output_dir), given.model_name_or_path or ""
        if os.path.exists(path) and os.path.commonpath([own, os.path.realpath(path)]) == own:
            raise InputError(
                f"teacher: {path} is in the output_dir of its own student: name another output_dir"
            )
        is_quantized = given.dtype in ("8bit", "4bit")
        if is_quantized and given.model:
            raise InputError(
                f"teacher.dtype: {given.dtype} is for weights that are loaded: give "
                "teacher.model_name_or_path"
            )
        if is_quantized and (launched_zero_stage() == 3 or launched_with("FSDP")):
            raise InputError(
                f"teacher.dtype: {given.dtype} cannot be split over the processes by ZeRO-3 and "
                "FSDP: launch with single_gpu.yaml, multi_gpu.yaml or zero2.yaml"
            )
        super().check()

    def fixed(self) -> dict[str, Any]:
        names = ("divergence", "beta", "temperature", "layer_map", "student_layers", *self.weights)
        names = (*names, "model_name_or_path", "student_intermediate_size")
        own = {name: getattr(self, name) for name in names}
        return super().fixed() | own | {"teacher": asdict(self.teacher)}

    @property
    def tokenizer_names(self) -> dict[str, str | None]:
        """A student's that has none of its own is the teacher's."""
        return super().tokenizer_names | {
            "teacher.model_name_or_path": self.teacher.model_name_or_path
        }

    @property
    def as_divergence(self) -> Divergence:
        return Divergence(self.divergence, self.beta, self.temperature)

    @property
    def is_carved(self) -> bool:
        return self.student_layers is not None or self.student_intermediate_size is not None

    def of_teacher(self) -> Self:
        """The same settings for the teacher as a model."""
        given = self.teacher
        return replace(
            self,
            model=given.model,
            model_name_or_path=given.model_name_or_path,
            tokenizer=self.tokenizer_name,
            attn_implementation=given.attn_implementation or self.attn_implementation,
            trust_remote_code=given.trust_remote_code,
            initialization="default",
            mup_base_width=None,
        )


@contextmanager
def of_the_teacher() -> Iterator[None]:
    """What is wrong in this context is wrong of the teacher."""
    try:
        yield
    except InputError as error:
        raise InputError(f"teacher: {error}") from None


def teacher_config(arguments: Any, tokenizer: Any) -> Any:
    """The teacher's configuration, checked against the tokenizer and the length of a row.

    Raises:
        InputError: no such model, or one with another tokenizer.
    """
    with of_the_teacher():
        return model_config(arguments.of_teacher(), tokenizer)


def load_teacher(
    arguments: Any, config: Any, auto_model: Any, accelerator: Any
) -> "transformers.PreTrainedModel":
    """The teacher in evaluation mode and without gradients; all ranks call it together.

    Under ZeRO-3 its weights are split over the processes, as the student's are. It is to be no
    submodule of the objective: neither `train()` nor an optimizer reaches it.

    Raises:
        InputError: it does not load, or lacks the head that the student learns from.
    """
    a, given = arguments, arguments.teacher
    dtype, options = PRECISIONS[a.mixed_precision], {}
    if given.dtype in ("8bit", "4bit"):
        options["quantization_config"] = quantization(given.dtype, dtype)
        options["quantization_config"].llm_int8_skip_modules = _heads(config, auto_model)
    elif given.dtype != "auto":
        dtype = getattr(torch, given.dtype)
    with of_the_teacher():
        model = build_model(a.of_teacher(), config, auto_model, dtype, **options)
    drawn = [name for name in model.newly_initialized if "pooler" not in name]
    if drawn:
        raise InputError(
            f"teacher: {given.model_name_or_path} has no {drawn[0]}: it is of another task"
        )
    if given.adapter_name_or_path:
        model = _with_adapter(model, given.adapter_name_or_path).base_model.model
    model.requires_grad_(False).eval()
    stage = launched_zero_stage()
    if stage < 3:
        return model if options else model.to(accelerator.device)
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine.module.eval()


def _heads(config: Any, auto_model: Any) -> list[str]:
    """What stands beside the base model: small, or of few rows, and all of what is learnt from."""
    model = empty_model(copy.deepcopy(config), auto_model)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _with_adapter(model: Any, path: str) -> Any:
    import peft

    check_not_pickled(path, f"peft.PeftModel.from_pretrained(base, {path!r})")
    try:
        return peft.PeftModel.from_pretrained(model, path)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())[:200] + looked_for(path)
        raise InputError(f"teacher.adapter_name_or_path: {path} does not fit: {problem}") from None


def whole(*parameters: torch.Tensor | None) -> Any:
    """A context in which parameters that ZeRO-3 has split can be read; all ranks enter it."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return gathered(split) if split else nullcontext()


def student_config(arguments: Any, of_teacher: Any, tokenizer: Any) -> Any:
    """The student's configuration: its own, or the teacher's with fewer layers and neurons.

    Raises:
        InputError: no such layers, or more neurons than there are.
    """
    a = arguments
    if not a.is_carved:
        return model_config(a, tokenizer)
    config = copy.deepcopy(of_teacher)
    text = config.get_text_config()
    count = text.num_hidden_layers
    layers = range(count) if a.student_layers is None else a.student_layers
    if not layers or not all(0 <= layer < count for layer in layers):
        raise InputError(
            f"student_layers: {[*layers]} are not among the teacher's 0 to {count - 1}"
        )
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == count:  # layer_types
            setattr(text, name, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    if (size := a.student_intermediate_size) is not None:
        most = getattr(text, "intermediate_size", None)
        if most is None or not 0 < size <= most:
            raise InputError(f"student_intermediate_size: {size} of the teacher's {most or 'none'}")
        text.intermediate_size = size
    return config


def student_model(
    arguments: Any, config: Any, auto_model: Any, folder: Path, of_teacher: Any = None
) -> "transformers.PreTrainedModel":
    """The model that is trained; all ranks call it together.

    One that is carved from the teacher is written to `folder`/student, and read from there.

    Args:
        of_teacher: the teacher's configuration, where it is not what its settings alone make.
    """
    from accelerate.state import AcceleratorState

    a = arguments
    if a.is_carved:
        path, ranks = folder / "student", AcceleratorState()
        # before a checkpoint there may be one of other settings
        is_new = not any(folder.glob("checkpoints/step-*")) or not path.exists()
        with ranks.main_process_first():
            if ranks.is_main_process and is_new:
                _write_student(a, config, auto_model, path, of_teacher)
        a = replace(a, model_name_or_path=str(path))
    return build_model(a, config, auto_model)


def _write_student(
    arguments: Any, config: Any, auto_model: Any, path: Path, of_teacher: Any
) -> None:
    a = arguments.of_teacher()
    of_teacher = copy.deepcopy(of_teacher) or model_config(a, load_tokenizer(a))
    with by_itself():
        teacher = build_model(a, of_teacher, auto_model)
        if a.teacher.adapter_name_or_path:
            teacher = _with_adapter(teacher, a.teacher.adapter_name_or_path).merge_and_unload()
        student = carved(teacher, empty_model(config, auto_model, "cpu"), arguments.student_layers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        student.save_pretrained(aside)
        write_checksums(aside)


def paired_layers(arguments: Any, student: Any, teacher: Any) -> list[int]:
    """For each layer of the student that of the teacher, counted from 1.

    Args:
        student, teacher: configurations.

    Raises:
        InputError: a map that does not fit.
    """
    both = (student, teacher)
    mine, theirs = (getattr(c.get_text_config(), "num_hidden_layers", None) for c in both)
    if None in (mine, theirs):
        kind = both[mine is not None].model_type
        raise InputError(f"model: {kind} does not say how many layers it has")
    layers = arguments.layer_map
    if layers is None and arguments.student_layers is not None:
        layers = [layer + 1 for layer in arguments.student_layers]
    layers = layers or [max(1, round(theirs * (i + 1) / mine)) for i in range(mine)]
    if len(layers) != mine or not all(1 <= layer <= theirs for layer in layers):
        raise InputError(
            f"layer_map: {layers} must name for each of the student's {mine} layers one of the "
            f"teacher's, 1 to {theirs}"
        )
    return layers
