"""What lives inside vLLM's workers: the engine's end of our wires, and the calls vLLM has no name for.

vLLM imports this module in each worker because ``VllmEngine`` names ``WorkerExtension`` as its worker extension; that
is the only moment at which a worker in a process of its own can learn of a transfer engine, so the import registers it.
Nothing else imports this file, which is why it may name vLLM at the top.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from operator import methodcaller
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed.weight_transfer import (  # noqa: TID253
    WeightTransferEngine,
    WeightTransferEngineFactory,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: TID253
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (  # noqa: TID253
    bind_routed_experts_capturer,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: TID253
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (  # noqa: TID253
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info  # noqa: TID253
from vllm.utils.torch_utils import set_random_seed  # noqa: TID253

from chatlearn.errors import WeightTransferError
from chatlearn.models.router_replay import expert_dtype
from chatlearn.rollout.vllm_engine import BACKEND_PREFIX
from chatlearn.weights.broadcast import BroadcastReceiver, join_as_worker
from chatlearn.weights.bucket import Bucket, unpacked
from chatlearn.weights.device_memory import DeviceMemoryReceiver
from chatlearn.weights.shared_memory import SharedMemoryReceiver
from chatlearn.weights.wire import Receiver, WireKind


class BucketEngine(WeightTransferEngine[Any, Any]):
    """vLLM's transfer engine for our buckets, whose tensors are those of a checkpoint.

    vLLM repacks weights for its kernels after loading, so loading again goes through its layer-wise reload: parameters
    get their original shapes back, each layer is repacked when all of it has arrived, values land in the old memory.
    """

    init_info_cls = dict
    update_info_cls = Bucket

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._reloading = False
        self._loaded: set[str] = set()
        self._parameters: frozenset[str] = frozenset()
        self._kernels: dict[str, weakref.ref[Any]] = {}
        self._receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the end of the wire that this engine was registered for."""
        match self.config.backend.removeprefix(BACKEND_PREFIX):
            case "shared_memory":
                self._receiver = SharedMemoryReceiver()
            case "ipc":
                self._receiver = DeviceMemoryReceiver(self.device)
            case wire:
                assert wire == "nccl", f"{wire} is no wire of ours"
                group = join_as_worker(init_info, self.parallel_config)
                self._receiver = BroadcastReceiver(group, self.device)

    def start_weight_update(self) -> None:
        """Open all layers for loading."""
        self.abandon()
        self._parameters = frozenset(name for name, _ in self.model.named_parameters())
        self._loaded = set()
        if self.device.type == "cpu":
            self._kernels = {name: weakref.ref(kernel) for name, kernel in packed_kernels(self.model).items()}
            forget_moe_kernels(self.model)
        initialize_layerwise_reload(self.model)
        self._reloading = True

    def receive_weights(self, update_info: Bucket) -> None:
        """Load one bucket; ``load_weights`` takes Hugging Face names, fuses and slices, and says what it wrote."""
        assert self._receiver is not None, "OpenTransfer comes first"
        pairs = unpacked(update_info, self._receiver.copy_of(update_info))
        self._loaded |= cast("Any", self.model).load_weights(pairs)

    def finish_weight_update(self) -> None:
        """Close all layers; raises where this update did not write all of a parameter of vLLM's, or pack it anew.

        A kernel from before the update has the old weights in it, or expects them to be packed as they no longer are.
        """
        # On a GPU padding cannot be told from what did not arrive.
        partly = partly_loaded(self.model) if self.device.type == "cpu" else {}
        self.abandon()
        unwritten = sorted(self._parameters - self._loaded)
        if unwritten:
            raise WeightTransferError(f"{unwritten[0]}: vLLM did not load it ({len(unwritten)} of its parameters)")
        for name, (loaded, all_numbers) in partly.items():
            raise WeightTransferError(
                f"{name}: vLLM loaded {loaded} of {all_numbers} numbers ({len(partly)} such layers)"
            )
        kernels = packed_kernels(self.model) if self._kernels else {}
        for name, kernel in kernels.items():
            if name in self._kernels and self._kernels[name]() is kernel:
                raise WeightTransferError(
                    f"{name}: still has the kernel from before the update; vLLM did not pack what arrived"
                )

    def abandon(self) -> None:
        """Close layers that are still open; without this a failed update's buffered parts would mix with the next."""
        if self._receiver is not None:
            self._receiver.release()
        if self._reloading:
            self._reloading = False
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                repack_heads(self.model)

    def shutdown(self) -> None:
        """Leave what the receiver is connected with."""
        if self._receiver is not None:
            self._receiver.close()


def forget_moe_kernels(model: torch.nn.Module) -> None:
    """Let the experts be repacked: while a kernel exists, vLLM 0.32 on the CPU leaves reloaded experts unpacked.

    It then computes nonsense without an error. Only for the CPU, where nothing else holds the kernel's addresses.
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


def partly_loaded(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Layers that are open for loading and have got some of their numbers but not all, with how many.

    Where several tensors become one parameter, as keys and values do, vLLM calls it loaded after the first of them. The
    tables of a vocabulary are padded, and never full.
    """
    modules = {
        name: get_layerwise_info(module)
        for name, module in model.named_modules()
        if not isinstance(module, VocabParallelEmbedding)
    }
    return {
        name: (info.load_numel, info.load_numel_total)
        for name, info in modules.items()
        if info.load_numel_total is not None and 0 < info.load_numel < info.load_numel_total
    }


def packed_kernels(model: torch.nn.Module) -> dict[str, Any]:
    """What computes with packed copies of weights on the CPU, by the module: experts, and output heads.

    Other linear layers are packed like heads; no way is known in which one of them would be left out.
    """
    modules = dict(model.named_modules())
    experts = {name: module for name, module in modules.items() if isinstance(module, RoutedExperts)}
    heads = {name: cast("Any", module) for name, module in modules.items() if isinstance(module, ParallelLMHead)}
    kernels: dict[str, Any] = {name: module.quant_method.moe_kernel for name, module in experts.items()}
    kernels |= {name: module.cpu_linear for name, module in heads.items()}
    return {name: kernel for name, kernel in kernels.items() if kernel is not None}


def repack_heads(model: torch.nn.Module) -> None:
    """Pack output heads anew: a head that is tied to the embedding is loaded through the embedding.

    The layer-wise reload of vLLM 0.32 sees no weights arrive for such a head, and on the CPU leaves it with the copy
    that was packed for its kernel when the engine started. It then computes with old weights without an error.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class RouteCapture:
    """Remembers, for the requests in a worker on the CPU, to which experts their tokens were sent.

    vLLM 0.32 returns routes from its second model runner only, which needs Triton. On the CPU the first one runs, but
    its routers tell their choice to whoever asks. Prefix caching must be off: what is cached passes no router.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        config = runner.model_config
        self._shape = (config.get_total_num_hidden_layers(), config.get_num_experts_per_tok())
        self._dtype = expert_dtype(config.get_num_experts())
        self._step: NDArray[Any] = np.zeros((0, *self._shape), dtype=self._dtype)  # [tokens of the step, L, K]
        self._last_layer = self._shape[0]
        self._pieces: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)

    def capture(self, layer: int, experts: Tensor) -> None:
        """What one router chose for the tokens [N, K] of the running step; layers come in order, from the first."""
        if layer <= self._last_layer:
            self._open_step()
        self._last_layer = layer
        self._step[:, layer] = experts[: len(self._step)].numpy()

    def take(self, request: str) -> NDArray[Any]:
        """The routes of a request's tokens, [F, L, K], which are forgotten with that."""
        nothing = np.zeros((0, *self._shape), dtype=self._dtype)
        return np.concatenate([nothing, *self._pieces.pop(request, [])])

    def _open_step(self) -> None:
        """Give every request its rows of a step whose layers come in one after the other."""
        batch = self._runner.input_batch
        ends = self._runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        self._step = np.zeros((ends[-1], *self._shape), dtype=self._dtype)
        for index, request in enumerate(batch.req_ids):
            pieces = self._pieces[request]
            # Tokens go in again after an update of the weights; what sampled the answer is what came first.
            num_again = sum(map(len, pieces)) - int(batch.num_computed_tokens_cpu[index])
            assert num_again >= 0, f"tokens of {request} passed no router"
            pieces.append(self._step[ends[index] : ends[index + 1]][num_again:])


class WorkerExtension:
    """Methods that vLLM adds to its worker class, called by name over ``collective_rpc``."""

    # The worker that this class is mixed into has them.
    weight_transfer_engine: Any
    model_runner: Any
    _weight_update_active: bool

    def chatlearn_reseed(self, seed: int) -> None:
        """Start the worker's random streams again; every tensor-parallel rank samples from equal ones."""
        set_random_seed(seed)

    def chatlearn_capture_routes(self) -> None:
        """Begin to remember where tokens are sent."""
        self._chatlearn_routes = RouteCapture(self.model_runner)
        bind_routed_experts_capturer(self.model_runner.get_model(), cast("Any", self._chatlearn_routes))

    def chatlearn_take_routes(self, request: str) -> NDArray[Any]:
        """The routes of a request, by vLLM's own name for it."""
        return self._chatlearn_routes.take(request)

    def chatlearn_transfer(self, method: str, arguments: tuple[Any, ...]) -> str | None:
        """Call a verb of the worker's for weight transfer; what is wrong with the weights comes back as text.

        Raised, it would leave the answers of the other tensor-parallel ranks in vLLM's queues, to be taken for those to
        the next call.
        """
        try:
            methodcaller(method, *arguments)(self)
        except WeightTransferError as error:
            return str(error)
        return None

    def chatlearn_abandon_update(self) -> None:
        """Make the worker ready for a new update after one that failed half-way."""
        self._weight_update_active = False
        if isinstance(self.weight_transfer_engine, BucketEngine):
            self.weight_transfer_engine.abandon()


for wire in get_args(WireKind):
    WeightTransferEngineFactory.register_engine(BACKEND_PREFIX + wire, BucketEngine)
