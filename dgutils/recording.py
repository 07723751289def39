"""Work that a GPU repeats, recorded once as a CUDA graph: launching its thousands of kernels then costs as one."""

import sys

import torch

WARM = 3  # calls before the recording, in which kernels are chosen and what is made once is made


class Recorded:
    """function(*tensors) for tensors of always the same shapes, which a GPU replays from its fourth call on.

    The function may change tensors in place; what it returns is overwritten by the next call. It may run `beside`. On a
    CPU it runs as it stands, and where it cannot be recorded too, which one line says.
    """

    def __init__(self, function, device):
        self.function, self.device, self.calls, self.streams = function, torch.device(device), 0, []
        self.inputs = self.graph = None

    def __call__(self, *tensors):
        if self.inputs is None:
            self.inputs = [tensor.to(self.device, copy=True) for tensor in tensors]
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.calls += 1
        if self.device.type == "cuda" and self.calls == WARM + 1:
            self._record()
        if self.graph:
            self.graph.replay()
        else:
            self.result = self.function(*self.inputs)
        return self.result

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.result = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:  # an old driver, or a layer that waits for the device
            why = str(error).partition("\n")[0][:100]
            print(f"a step is not recorded ({why}): slower", file=sys.stderr)

    def beside(self, calls) -> None:
        """Make all calls, on a GPU each on a stream of its own, always the same, that follows what was done so far."""
        if self.device.type != "cuda":
            for call in calls:
                call()
            return
        self.streams += [torch.cuda.Stream() for _ in calls[len(self.streams) :]]
        here, mine = torch.cuda.current_stream(), self.streams[: len(calls)]
        for stream, call in zip(mine, calls, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                call()
        for stream in mine:
            here.wait_stream(stream)
