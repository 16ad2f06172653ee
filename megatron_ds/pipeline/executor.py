"""The one executor: it walks a rank's list of actions and runs them. A mesh of one rank is a schedule of one stage.

It knows modules, tensors and two process groups, and neither models nor schedules' reasons. A stage is any module
called as ``stage(micro_batch, hidden)`` that returns the activation for the next stage, or on the last stage the
scalar *sum* of its losses (see ``train/step.py`` for who normalises it).

A loss that computes its gradients along with itself would keep a whole gradient of the output weights until its
backward pass. So a last stage that can (``defers_loss``) computes its loss when its backward pass begins, and is told
the gradient of it (``seed``): what comes for the weights goes straight where it is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_ds.errors import ScheduleError
from megatron_ds.mesh import Axis
from megatron_ds.pipeline.action import MAX_SENDS, Action, Op
from megatron_ds.pipeline.graphs import MicroBatchGraphs
from megatron_ds.pipeline.passes import make_ready
from megatron_ds.pipeline.run_backward import run_backward
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.stopwatch import timed
from megatron_ds.pipeline.timeline import Event
from megatron_ds.pipeline.transfers import Receive, Send, SizedReceive

MicroBatch = Mapping[str, Tensor]


class Gradients(Protocol):
    """Who collects the gradients of a rank's stages, and is told of each backward pass; ``ZeroOptimizer`` is one.

    ``last``: no later action of this step adds a gradient to the stage, so that gradients may be reduced as they
    become final.
    """

    def start_backward(self, last: bool, stage: int = 0) -> None:
        """A backward pass of ``stage`` follows."""

    def end_backward(self, stage: int = 0) -> None:
        """The backward pass that was started is over."""

    def start_input_backward(self, stage: int, micro_batch: int) -> None:
        """A ``B`` follows whose weight gradients are a ``W`` of their own: what comes for weights is kept for it."""

    def end_input_backward(self, stage: int) -> None:
        """The input gradients are there."""

    def add_weight_gradients(self, stage: int, micro_batch: int) -> None:
        """Compute what was kept of a micro-batch and add it up, between ``start_backward`` and ``end_backward``."""


class LeftToAutograd:
    """Gradients are left where autograd puts them, in ``.grad``, as a ``B`` finds them: a ``W`` does nothing."""

    def start_backward(self, last: bool, stage: int = 0) -> None:
        pass

    def end_backward(self, stage: int = 0) -> None:
        pass

    def start_input_backward(self, stage: int, micro_batch: int) -> None:
        pass

    def end_input_backward(self, stage: int) -> None:
        pass

    def add_weight_gradients(self, stage: int, micro_batch: int) -> None:
        pass


@dataclass
class _InFlight:
    """What a stage keeps of a micro-batch between its forward and its backward.

    Of the output the autograd graph alone: its values are needed no more once they are sent.
    """

    hidden: Tensor | None
    output: GradientEdge
    dtype: torch.dtype
    before_loss: Tensor | None = None  # where the loss is computed with the backward: what it is computed of


@dataclass
class _Run:
    """The state of one pass over the schedule."""

    micro_batches: Sequence[MicroBatch]
    seed: Tensor | None
    loss: Tensor
    in_flight: dict[tuple[int, int], _InFlight] = field(default_factory=dict)
    # Posted receives and issued sends. A send keeps its tensor alive until it is done.
    receives: dict[Action, Receive | SizedReceive] = field(default_factory=dict)
    sends: list[Send] = field(default_factory=list)
    # Between two stages of one rank a tensor is handed over without a transfer.
    handed_over: dict[Action, Tensor] = field(default_factory=dict)


class Executor:
    """Runs a schedule on this rank.

    Args:
        schedule: compute actions of all ranks, as ``build_schedule`` returns them (transfers are added here).
        other_sizes: the same for other numbers of micro-batches, where steps differ in it (batch ramp-up).
        stages: this rank's stages by global stage index, as the schedule places them.
        pp, pp_back: the pipeline axis with the groups that carry activations to later ranks and gradients back.
        against: the same for activations to earlier ranks and gradients back, where several stages of a rank make
            them flow both ways; see :meth:`megatron_ds.mesh.Mesh.against_the_flow`.
        activation_shape: of what flows between stages, ``[s, b, h]``, for a micro-batch: sizes may differ between
            micro-batches, and all ranks of a pipeline have the same ones. With None it is 1-d, and of a length and a
            dtype that it says itself.
        dtype, device: of what flows.
        gradients: who collects the gradients; default: they stay in ``.grad``.

    Raises:
        ScheduleError: the schedules and the stages do not fit each other or the axis.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, nn.Module],
        *,
        pp: Axis,
        pp_back: Axis,
        against: tuple[Axis, Axis] | None = None,
        activation_shape: Callable[[MicroBatch], tuple[int, ...]] | None,
        dtype: torch.dtype,
        device: torch.device,
        gradients: Gradients | None = None,
        other_sizes: Sequence[Schedule] = (),
    ):
        self.stages = dict(stages)
        self.pp, self.pp_back, self._against = pp, pp_back, against
        self.activation_shape, self.dtype, self.device = activation_shape, dtype, device
        self.gradients = gradients or LeftToAutograd()
        self.placement = schedule.placement
        self.actions: dict[int, tuple[Action, ...]] = {}  # by the number of micro-batches
        links: set[tuple[int, int, Op]] = set()
        for one in (schedule, *other_sizes):
            self._require_fit(one)
            ready = make_ready(one)
            links.update(ready.links())
            self.actions[one.num_micro_batches] = ready[pp.rank]
        self._connect(sorted(links))
        self.recorded: list[Event] | None = None
        self.graphs: MicroBatchGraphs | None = None  # replays the passes of a micro-batch; of a single stage
        self._doing: Action | None = None  # read by another thread when a rank hangs

    def _require_fit(self, schedule: Schedule) -> None:
        if len(schedule) != self.pp.size or schedule.placement != self.placement:
            raise ScheduleError(
                f"a schedule of {len(schedule)} ranks with stages on {list(schedule.placement.ranks)} does not fit a "
                f"pipeline of {self.pp.size} ranks with stages on {list(self.placement.ranks)}; build all of a run's "
                "schedules for its mesh, with one placement"
            )
        placed = self.placement.stages_of(self.pp.rank)
        if sorted(self.stages) != placed:
            raise ScheduleError(
                f"pipeline rank {self.pp.rank} is given the stages {sorted(self.stages)}, but the schedule places "
                f"{placed} there; build those"
            )

    def _connect(self, links: Sequence[tuple[int, int, Op]]) -> None:
        """One small transfer over each link, in one order on all ranks.

        Under NCCL the first transfer between two ranks makes their communicator, which blocks the host until both are
        there. With receives posted ahead that could be a circle.
        """
        for source, target, op in links:
            axis = self._axis(op, source, target)
            token = torch.zeros(1, device=self.device)
            if axis.group is not None and axis.rank == source:
                dist.send(token, axis.ranks[target], group=axis.group)
            elif axis.group is not None and axis.rank == target:
                dist.recv(token, axis.ranks[source], group=axis.group)

    def _axis(self, op: Op, source: int, target: int) -> Axis:
        """Between two ranks activations and gradients have a group for each direction, with one order of transfers."""
        back = op is Op.SEND_B or op is Op.RECV_B
        if (source > target) == back:
            return self.pp_back if back else self.pp
        if self._against is None:
            raise ScheduleError(
                f"the schedule sends {'gradients' if back else 'activations'} from rank {source} to rank {target} of "
                "the pipeline too, against their flow; give the executor against=mesh.against_the_flow()"
            )
        return self._against[back]

    @property
    def has_last_stage(self) -> bool:
        """Whether the losses are computed on this rank."""
        return self.placement.num_stages - 1 in self.stages

    def where(self) -> str:
        """What this rank is doing, for a message; empty between two runs."""
        action = self._doing
        if action is None:
            return ""
        what = "gradient" if action.op in (Op.B, Op.RECV_B) else "activation"
        if action.op.is_receive:
            source = self.pp.ranks[self.placement.rank_of(action.counterpart.stage)]
            return f"{action}, waiting for the {what} of micro-batch {action.micro_batch} from rank {source}"
        verb = {Op.F: "forward", Op.B: "backward", Op.W: "weight gradient"}.get(action.op, "transfer")
        return f"{action}, {verb} of micro-batch {action.micro_batch} on stage {action.stage}"

    def run(self, micro_batches: Sequence[MicroBatch], seed: Tensor) -> Tensor:
        """Forward and backward of every micro-batch.

        Args:
            seed: 0-d gradient of the summed loss: the one place where normalisation and loss scale enter.

        Returns:
            The sum of the losses of this rank's micro-batches (0-d; zero on every stage but the last). Gradients
            are in the parameters.
        """
        actions = self.actions.get(len(micro_batches))
        if actions is None:
            raise ValueError(
                f"{len(micro_batches)} micro-batches for a schedule of {', '.join(map(str, self.actions))}; "
                "build the schedule for the number of micro-batches"
            )
        return self._execute(actions, micro_batches, seed)

    @torch.no_grad()
    def run_forward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Forward only, for evaluation, of any number of micro-batches. Returns what :meth:`run` returns."""
        forwards = Schedule.of(
            (
                [Action(stage, Op.F, i) for i in range(len(micro_batches)) for stage in self.placement.stages_of(rank)]
                for rank in range(self.pp.size)
            ),
            self.placement,
            len(micro_batches),
        )
        return self._execute(make_ready(forwards)[self.pp.rank], micro_batches, None)

    def _execute(self, actions: Sequence[Action], micro_batches: Sequence[MicroBatch], seed: Tensor | None) -> Tensor:
        split = {action.stage for action in actions if action.op is Op.W}
        # The last action of each stage that adds to its gradients.
        last = {action.stage: action for action in actions if action.op is (Op.W if action.stage in split else Op.B)}
        run = _Run(micro_batches, seed, torch.zeros((), dtype=torch.float64, device=self.device))
        for action in actions:
            self._doing = action
            if action.op.is_receive:
                self._post_receive(action, run)
            elif action.op.is_send:
                self._send(action, run)
            elif action.op is Op.F:
                hidden = self._take(Action(action.stage, Op.RECV_F, action.micro_batch), run)
                if self.graphs is not None and run.seed is not None:
                    continue  # with the backward pass
                with self._recording(action):
                    self._forward(action, hidden, run)
            elif action.op is Op.B:
                grad = self._take(Action(action.stage, Op.RECV_B, action.micro_batch), run)
                if action.stage in split:
                    self.gradients.start_input_backward(action.stage, action.micro_batch)
                    with self._recording(action):
                        self._backward(action, grad, run)
                    self.gradients.end_input_backward(action.stage)
                else:
                    self.gradients.start_backward(last[action.stage] == action, action.stage)
                    if self.graphs is not None and seed is not None:
                        run.loss += self.graphs(self._passes, run.micro_batches[action.micro_batch], seed)
                    else:
                        with self._recording(action):
                            self._backward(action, grad, run)
                    self.gradients.end_backward(action.stage)
            elif action.op is Op.W:
                self.gradients.start_backward(last[action.stage] == action, action.stage)
                with self._recording(action):
                    self.gradients.add_weight_gradients(action.stage, action.micro_batch)
                self.gradients.end_backward(action.stage)
            else:
                raise ScheduleError(f"{action} is no action that the executor knows; it runs {', '.join(Op)}")
        for sent in run.sends:
            sent.wait()
        self._doing = None
        return run.loss

    def _passes(self, batch: MicroBatch, seed: Tensor) -> Tensor:
        """Both passes of a micro-batch through the one stage that is the whole model; the loss."""
        run = _Run([batch], seed, torch.zeros((), dtype=torch.float64, device=self.device))
        self._forward(Action(0, Op.F, 0), None, run)
        self._backward(Action(0, Op.B, 0), None, run)
        return run.loss

    def _forward(self, action: Action, hidden: Tensor | None, run: _Run) -> None:
        if hidden is not None and run.seed is not None:
            hidden.requires_grad_()
        stage, is_last = self.stages[action.stage], action.stage == self.placement.num_stages - 1
        later = is_last and run.seed is not None and getattr(stage, "defers_loss", False)
        more = {"part": "before loss"} if later else {}
        output = stage(run.micro_batches[action.micro_batch], hidden, **more)
        if later:
            pass
        elif is_last:
            run.loss += output.detach()
        else:
            self._hand_over(Action(action.stage, Op.SEND_F, action.micro_batch), output.detach(), run)
        if run.seed is not None:
            kept = _InFlight(hidden, get_gradient_edge(output), output.dtype, output if later else None)
            run.in_flight[action.stage, action.micro_batch] = kept

    def _backward(self, action: Action, grad: Tensor | None, run: _Run) -> None:
        kept = run.in_flight.pop((action.stage, action.micro_batch))
        output: GradientEdge | Tensor = kept.output
        if kept.before_loss is not None:
            batch = run.micro_batches[action.micro_batch]
            output = loss = self.stages[action.stage](batch, kept.before_loss, part="loss", seed=run.seed)
            kept.dtype = loss.dtype
            run.loss += loss.detach()
        if grad is None:
            assert run.seed is not None
            grad = run.seed.to(kept.dtype)
        run_backward(output, grad)
        if kept.hidden is not None:
            assert kept.hidden.grad is not None
            self._hand_over(Action(action.stage, Op.SEND_B, action.micro_batch), kept.hidden.grad, run)

    def _hand_over(self, send: Action, tensor: Tensor, run: _Run) -> None:
        """Keep a result for the send that follows it, or for the neighbouring stage where that is on this rank."""
        target = send.counterpart
        local = self.placement.rank_of(target.stage) == self.pp.rank
        run.handed_over[target if local else send] = tensor

    def _take(self, receive: Action, run: _Run) -> Tensor | None:
        """What a compute action gets from its neighbour; None at either end of the pipeline."""
        if receive in run.handed_over:
            return run.handed_over.pop(receive)
        if receive not in run.receives:
            return None
        action, self._doing = self._doing, receive
        with self._recording(receive):
            tensor = run.receives.pop(receive).wait()
        self._doing = action
        return tensor

    def _post_receive(self, action: Action, run: _Run) -> None:
        sender = self.placement.rank_of(action.counterpart.stage)
        axis = self._axis(action.op, sender, self.pp.rank)
        source = axis.ranks[sender]
        if self.activation_shape is None:
            run.receives[action] = SizedReceive(self.device, source, axis.group)
        else:
            shape = self.activation_shape(run.micro_batches[action.micro_batch])
            run.receives[action] = Receive(shape, self.dtype, self.device, source, axis.group)

    def _send(self, action: Action, run: _Run) -> None:
        receiver = self.placement.rank_of(action.counterpart.stage)
        axis = self._axis(action.op, self.pp.rank, receiver)
        target = axis.ranks[receiver]
        tensor = run.handed_over.pop(action).contiguous()
        if len(run.sends) >= MAX_SENDS:
            run.sends.pop(0).wait()
        with self._recording(action):
            run.sends.append(Send(tensor, self.activation_shape is None, target, axis.group))

    def _recording(self, action: Action) -> AbstractContextManager[None]:
        if self.recorded is None:
            return nullcontext()
        return timed(self.recorded, self.pp.rank, action, self.device)
