"""A student before it has learnt: its checkpoint, of which it may keep a part, and its tokenizer."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

from datasets import Dataset
from distill.student.architecture import cut_positions, keep_layers
from distill.student.average import average_tokens, frequent_bigrams
from distill.student.checks import refuse_bigrams
from distill.student.heads import keep_heads
from distill.student.hidden_states import refuse_two_stacks
from distill.student.neurons import keep_neurons
from distill.student.options import StudentOptions
from distill.student.shape import Goal, Shape, choose_shape, shapes
from transformers import set_seed

from distill.artifact import Manifest
from distill.averaging import depth, is_layerless, refuse_pairs
from distill.checkpoints import recorded_recipe
from distill.data import Data, texts_of
from distill.models import load_model, load_tokenizer
from distill.processes import once


def build_student(
    options: StudentOptions, teacher: Manifest, data: Data, corpus: Dataset
) -> tuple[Any, Any, Shape, bool]:
    """Load the student's checkpoint, of which it may keep a part, and its tokenizer.

    Tells what it keeps, and whether its embeddings are to start from the teacher.
    """
    checkpoint = options.student or str(teacher.options["model"])
    length = min(options.max_length, teacher.max_length)
    tokenizer = load_tokenizer(checkpoint, length, "--student", teacher.long_texts)
    set_seed(options.seed)
    model = load_model(
        checkpoint, teacher.labels, "--student", options.dropout, problem_type=teacher.problem_type
    )

    pairs, total = bool(data.columns.text_pair), depth(model)
    refuse_bigrams(options.bigrams, is_layerless(model))

    @cache
    def bigrams() -> list[tuple[int, int]]:
        return frequent_bigrams(tokenizer, texts_of(corpus), options.bigrams)

    def build(shape: Shape, corpus: Dataset = corpus) -> Any:
        if shape.layers == 0 and not is_layerless(model):
            return average_tokens(model, tokenizer, options.dropout, bigrams())
        built = keep_layers(model, shape.layers) if shape.layers not in (None, total) else model
        texts = texts_of(corpus) if shape.neurons or shape.heads else []
        if shape.neurons is not None:
            built = keep_neurons(built, shape.neurons, texts, tokenizer)
        if shape.heads is not None:
            built = keep_heads(built, shape.heads, texts, tokenizer)
        return built

    shape = Shape(options.layers, options.intermediate_size, options.attention_heads)
    refuse_pairs(shape.layers == 0 or is_layerless(model), pairs)
    if options.speedup or options.latency_budget:
        # A resumed run goes on with what was measured first.
        recorded = recorded_recipe(options).get("shape")
        if recorded:
            shape = Shape(**recorded)
        else:
            # Which neurons and heads stay does not matter to speed.
            quickly = partial(build, corpus=corpus.select(range(1)))
            candidates = shapes(model, shape, quickly, layerless=not pairs)
            timed, goal = texts_of(data.splits["validation"]), Goal(options.speedup, options.latency_budget)
            choose = partial(
                choose_shape, quickly, candidates, tokenizer, teacher.labels, timed, goal, options.teacher
            )
            shape = once(choose)
    elif shape.layers is None and options.student is None and total:
        shape = replace(shape, layers=max(1, total // 2))
    built = cut_positions(build(shape), tokenizer.model_max_length)
    refuse_two_stacks(options.hidden_epochs, options.teacher, built.config)
    if is_layerless(built):  # it does not read which text of a pair a token is of
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    from_teacher = is_layerless(built) and not is_layerless(model) and options.student is None
    return built, tokenizer, shape, from_teacher
