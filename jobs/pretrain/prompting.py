"""Which prompts to ask of a scene, and what each should find."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jobs.pretrain.words import absent_word
from sam3lora.data.synth.scenes import ALL_CONCEPTS, TEXTURES, Concept, SceneObject, concepts_of

VISUAL = "visual"  # the text that SAM 3's processor uses when only boxes are given


@dataclass
class ScenePrompt:
    """A prompt, the numbers of the objects it names (none: absent), and optional exemplar boxes (object, label)."""

    prompt: str
    kind: str
    wanted: list[int]
    exemplars: list[tuple[int, int]] = field(default_factory=list)


def ask(
    objects: list[SceneObject],
    rng: np.random.Generator,
    *,
    positives: int = 2,
    negatives: int = 2,
    exemplars: bool = False,
) -> list[ScenePrompt]:
    """Prompts of one scene: kinds are drawn evenly, negatives are mostly near misses."""
    named: dict[str, list[Concept]] = {}
    for concept in dict.fromkeys(concept for thing in objects for concept in concepts_of(thing)):
        if not concept.is_ambiguous_in(objects):
            named.setdefault(concept.kind, []).append(concept)
    questions: list[ScenePrompt] = []
    for _ in range(positives):
        # Textures can be asked of few scenes (see ``is_ambiguous_in``), so twice as often there.
        kinds = sorted([*named, *({"texture"} & set(named))])
        kind = kinds[rng.integers(len(kinds))]
        concept = named[kind][rng.integers(len(named[kind]))]
        wanted = [number for number, thing in enumerate(objects) if concept.matches(thing)]
        question = ScenePrompt(concept.prompt, kind, wanted)
        if exemplars and rng.random() < 0.5:
            question = _with_exemplars(objects, question, rng)
        questions.append(question)
    while len(questions) < positives + negatives:
        questions.append(_absent(objects, rng))
    return questions


def _with_exemplars(objects: list[SceneObject], question: ScenePrompt, rng: np.random.Generator) -> ScenePrompt:
    """A box on one of the wanted objects, with its text or without any; then everything that looks alike is wanted."""
    pointed = question.wanted[rng.integers(len(question.wanted))]
    if rng.random() < 0.35:
        return ScenePrompt(question.prompt, question.kind, question.wanted, [(pointed, 1)])
    example = objects[pointed]
    alike = [
        number for number, thing in enumerate(objects) if (thing.noun, thing.colour) == (example.noun, example.colour)
    ]
    return ScenePrompt(VISUAL, "exemplar", alike, [(pointed, 1)])


def _absent(objects: list[SceneObject], rng: np.random.Generator) -> ScenePrompt:
    """A prompt that names nothing in the scene: two times in three one that shares a word with something there."""
    for _ in range(20):
        roll = rng.random()
        if roll < 0.15:
            return ScenePrompt(absent_word(rng), "unknown", [])
        near = objects[rng.integers(len(objects))]
        if roll < 0.3 and any(thing.texture for thing in objects):
            concept = Concept("texture", texture=TEXTURES[rng.integers(len(TEXTURES))])
        elif roll < 0.75 and near.colour:
            other = objects[rng.integers(len(objects))]
            if rng.random() < 0.5 and other.colour:
                concept = Concept("colour+shape", noun=other.noun, colour=near.colour)
            else:
                pool = [
                    c
                    for c in ALL_CONCEPTS
                    if c.kind == "colour+shape" and (c.noun == near.noun) != (c.colour == near.colour)
                ]
                concept = pool[rng.integers(len(pool))]
        else:
            kinds = ("natural", "shape", "colour", "texture")
            kind = kinds[rng.integers(4)]
            pool = [c for c in ALL_CONCEPTS if c.kind == kind]
            concept = pool[rng.integers(len(pool))]
        if not concept.is_ambiguous_in(objects) and not any(concept.matches(thing) for thing in objects):
            return ScenePrompt(concept.prompt, concept.kind, [])
    return ScenePrompt(absent_word(rng), "unknown", [])
