"""Core ML packages read from disk and computed in PyTorch, on any operating system.

Core ML runs on Apple's systems only; its programs are written in MIL, a small language of tensor
operations whose meaning is public. This package reads an .mlpackage as the phone would (``blob``,
``values``, ``package``), knows what each operation computes (``registry`` and one module for each
family), and runs functions with their states (``interpreter``):

    package = read_package(Path("model.mlpackage"))
    interpreter = Interpreter(package)
    states = interpreter.states("decode")
    logits = interpreter.run("decode", inputs, states)["logits"]

**What its numbers mean.** Every value has the dtype that the program declares. Operations that
compute do so in float32, and what is declared as float16 is rounded to it once, at the end of each
operation; sums run in float32. A phone's compute unit may hold float16 sums, or fuse operations
and round less often: agreement with this package proves that the program is right, and a
difference of a few float16 steps from a phone is no fault of either. Integers are exact.
What Core ML leaves undefined, such as an index outside of its axis, is an error here.

**What it is not.** A compiler, a fast runtime, or complete: control flow, convolutions and random
numbers are missing. A program that uses what is missing is refused by name before anything runs.
"""
