"""The parts of a training worker, built from the configuration: device, base model, adapter, optimizer."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import Sam3Model

from sam3lora.config import Config
from sam3lora.engine.device import describe_gpu, has_bfloat16
from sam3lora.engine.graphs.capture import wants_cuda_graphs
from sam3lora.errors import UserError
from sam3lora.losses import Criterion
from sam3lora.model.adapter.folder import AdapterMetadata
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.base_folder import BaseFolder, find_base
from sam3lora.model.checkpointing import enable_checkpointing, worth_checkpointing
from sam3lora.model.components import COMPONENTS, adapted_modules
from sam3lora.model.loading import LoadedBase, fitting_config, load_base, tokenize
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training.datasets import RunData
from sam3lora.training.distributed import gather_objects
from sam3lora.training.features.encoder import ImageEncoder, open_cache
from sam3lora.training.features.trunk_cache import TrunkCache, frozen_part, why_trunk_changes
from sam3lora.training.graphs.gradient_graphs import cuda_gradient_graphs
from sam3lora.training.graphs.graphed_sam3 import GraphedCosts, GraphedSam3
from sam3lora.training.optimization import build_optimizer
from sam3lora.training.step import LossRunner
from sam3lora.training.text_features import TextBank

logger = logging.getLogger(__name__)


def choose_device(config: Config, *, use_ray: bool) -> torch.device:
    """The device of this worker.

    Raises:
        UserError: `scaling.use_gpu` is true and torch finds no GPU, or the settings need bfloat16 and the GPU lacks it.
    """
    device = _own_device(config, use_ray)
    _check_bfloat16(config, device)
    return device


def _own_device(config: Config, use_ray: bool) -> torch.device:
    if use_ray:
        import ray
        from ray.train.torch import get_device

        # The CPUs that the worker reserved include those of its data tasks, which torch must leave to them.
        own = ray.get_runtime_context().get_assigned_resources().get("CPU", 1) - config.training.num_workers
        torch.set_num_threads(max(1, min(int(own), torch.get_num_threads())))
        return get_device()
    wanted = config.scaling.use_gpu
    if wanted is True and not torch.cuda.is_available():
        raise UserError("scaling.use_gpu is true, but torch finds no GPU here: set it to auto or false")
    on_gpu = wanted and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _check_bfloat16(config: Config, device: torch.device) -> None:
    """Refuse what is written in the configuration and needs bfloat16, on a GPU without it."""
    model = config.model
    needs = {
        "training.mixed_precision is bf16": config.training.mixed_precision == "bf16",
        "model.dtype is bfloat16": model.dtype == "bfloat16",
        f"model.quantization is {model.quantization}": model.quantization != "none",
    }
    needing = [words for words, does in needs.items() if does]
    if needing and not has_bfloat16(device):
        raise UserError(
            f"{' and '.join(needing)}, but {describe_gpu(device)} of host {socket.gethostname()} does not compute in "
            "bfloat16: set training.mixed_precision=no model.dtype=float32 model.quantization=none"
        )


def computes_in_bf16(config: Config, device: torch.device) -> bool:
    """Whether this run's forward passes are in bfloat16: the same answer on all workers, also where GPUs differ."""
    if config.training.mixed_precision != "auto":
        return config.training.mixed_precision == "bf16"
    lacking = [gpu for gpu in gather_objects(None if has_bfloat16(device) else describe_gpu(device)) if gpu]
    if lacking:
        logger.warning(
            "training.mixed_precision is auto: training in float32, since %s does not compute in bfloat16. This takes "
            "more memory and time",
            lacking[0],
        )
    return not lacking


def nodes_of_other_workers(*, use_ray: bool) -> tuple[str, ...]:
    """Ids of Ray's nodes on which other workers of this run read the same images; called by all workers."""
    if not use_ray:
        return ()
    import ray

    own = ray.get_runtime_context().get_node_id()
    return tuple(sorted(set(gather_objects(own)) - {own}))


def find_base_model(config: Config) -> BaseFolder:
    """The files of the base model, with what a look at them tells before anything is loaded.

    Raises:
        UserError: The base model is not found, not readable, or does not fit the settings.
    """
    model = config.model
    folder = find_base(model.name, revision=model.revision, local_files_only=model.local_files_only)
    fitting_config(folder, model.resolution, model.quantization)
    return folder


def load_base_model(config: Config, folder: BaseFolder, device: torch.device) -> LoadedBase:
    model = config.model
    return load_base(
        folder,
        dtype=model.dtype,
        device=device,
        attention=model.attention,
        resolution=model.resolution,
        quantization=model.quantization,
    )


def add_adapter(config: Config, base: LoadedBase, data: RunData, device: torch.device) -> tuple[PeftModel, LossRunner]:
    """Add the adapter to the base model, and build what computes its loss. ``data`` gets the feature cache."""
    training = config.training
    torch.manual_seed(training.seed)
    model = apply_lora(base.model, config.lora.settings, geometry_cls=config.model.geometry_cls)
    sam3 = cast(Sam3Model, model.get_base_model())
    checkpointed = training.gradient_checkpointing
    components = worth_checkpointing(sam3, COMPONENTS if checkpointed is True else tuple(checkpointed or ()))
    enable_checkpointing(sam3, components)
    bf16 = computes_in_bf16(config, device)
    if bf16:
        store_matrices_in(sam3, torch.bfloat16, text_tower=config.lora.apply_to_text_encoder)
    staged, criterion = make_stages(sam3, components, config, device)
    text = TextBank(
        staged,
        lambda prompts: tokenize(base.tokenizer, prompts),
        trainable=config.lora.apply_to_text_encoder,
        device=device,
    )
    text.add(data.prompts)
    text.release_tower()
    changing = why_trunk_changes(config, adapted_modules(sam3), cast(Any, sam3).vision_encoder.backbone.config)
    frozen = frozen_part(staged, bf16=bf16)
    trunk = open_cache(config, base, frozen, data, device, bf16=bf16, changing=changing)
    if training.compile:
        _compile(sam3, trunk, data, device)
    images = ImageEncoder(
        staged,
        config.lora.apply_to_vision_encoder,
        device=device,
        settings=data.valid_settings,
        image_mean=base.image_mean,
        image_std=base.image_std,
        trunk=trunk,
    )
    runner = LossRunner(
        staged=staged,
        criterion=criterion,
        images=images,
        text=text,
        device=device,
        bf16=bf16,
        one_to_many=training.one_to_many,
    )
    return model, runner


def make_stages(
    sam3: Sam3Model, checkpointing: Iterable[str], config: Config, device: torch.device
) -> tuple[StagedSam3, Criterion]:
    """The model in stages and its loss, which are graphs on a GPU unless `training.cuda_graphs` is false."""
    settings: dict[str, Any] = {"geometry_cls": config.model.geometry_cls, "checkpointing": checkpointing}
    # Gradients are averaged without DistributedDataParallel, so parameters may lack one.
    criterion = Criterion(config.training.loss, touch_unused=False)
    if device.type != "cuda" or not wants_cuda_graphs(config.training.cuda_graphs):
        return StagedSam3(sam3, **settings), criterion
    graphs = cuda_gradient_graphs(device)
    criterion.tables = GraphedCosts(criterion.tables, graphs)
    return GraphedSam3(sam3, graphs=graphs, **settings), criterion


def make_optimizer(config: Config, model: nn.Module, rates: Mapping[str, float]) -> torch.optim.AdamW:
    """`rates` are peak learning rates of components that have one of their own."""
    training = config.training
    return build_optimizer(
        model,
        learning_rate=training.learning_rate,
        component_learning_rates=rates,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
    )


def adapter_metadata(config: Config, base: LoadedBase, data: RunData) -> AdapterMetadata:
    found = run_metadata(
        base,
        data,
        prompts=list(data.prompts),
        geometry_cls=config.model.geometry_cls,
        post_processing=config.evaluation.post_processing,
        lora=config.lora.settings.to_dict(),
    )
    found.data["exhaustive"] = config.data.exhaustive
    return found


def run_metadata(base: LoadedBase, data: RunData, **of_task: Any) -> AdapterMetadata:
    """What the folder of every task says of its base and data; `of_task` are further fields."""
    return AdapterMetadata(
        base_model=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        resolution=base.resolution,
        data=data.summary(),
        **of_task,
    )


def ray_report():
    """The function that hands measured values to Ray Train."""
    from ray import train

    return train.report


def _compile(sam3: Sam3Model, trunk: TrunkCache | None, data: RunData, device: torch.device) -> None:
    """Compile the layers of the vision trunk that training images pass in every epoch."""
    num_kept = trunk.num_layers if trunk is not None and data.train_settings.features is not None else 0
    layers = list(cast(Any, sam3).vision_encoder.backbone.layers)[num_kept:]
    if not layers:
        raise UserError(
            "training.compile is true, but no module of the vision trunk is adapted, so each image passes it once: set "
            "training.compile to false"
        )
    compile_layers(layers, device)


def compile_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Set each layer to be compiled in place at its first run, adapters and checkpointing included.

    Raises:
        UserError: The device's compiler is missing: a C++ compiler for a CPU, Triton for a GPU.
    """
    missing = _missing_compiler(device)
    if missing is not None:
        raise UserError(f"training.compile is true, but {missing}: install one, or set training.compile to false")
    for layer in layers:
        layer.compile()


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton does not work here"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler (g++ or clang++; the variable CXX names another)"
    return None
