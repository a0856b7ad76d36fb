"""Distillation: a teacher answers rows without an answer, and its probabilities are labels next to the rows' tokens.

The loss of a token is weight * temperature^2 * KL(teacher || student) + (1 - weight) * cross entropy; both models in
the divergence have train.teacher_temperature (Hinton et al., arXiv:1503.02531, section 2). Of a distribution, the TOP_K
largest probabilities are kept, and all other tokens count as one. The teacher is loaded before the student, and its
memory is freed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strop.config.schema import Recipe, TrainSection
from strop.data.answers import Answer, Answers, NoAnswer, key_of, read_answers, write_answers
from strop.data.prepare import Prepared, list_unanswered
from strop.data.rendering.render import render_prompts
from strop.data.row_errors import RenderError
from strop.data.store import Examples, LazySequence, request_message
from strop.data.types import Conversation, Example, Ids, Message, strip_reasoning
from strop.engine.step import Step, step_for
from strop.errors import DataError, Location, RecipeError
from strop.evaluation.chat_server import ChatServer, RequestRefused, check_address, is_address, whole_text
from strop.models.adapter_config import adapter_folder, check_adapter_kind
from strop.models.adapters import locate_base, locate_tokenizer, model_identity
from strop.models.source import Source, locate
from strop.models.tokenizer import load_tokenizer
from strop.runs.folder import RunFolder, cache_folder, write_atomic
from strop.runs.lock import sha256_file, sha256_text
from strop.training.server_probs import TOP_LOGPROBS, TokenReader, lacks_probabilities, read_distributions
from strop.training.soft_labels import Distributions, find_distributions, model_key, read_or_compute, soften

if TYPE_CHECKING:
    from strop.engine.decode.model import Model

TOP_K = 32
DEFAULT_WEIGHT = 0.5  # of the teacher's probabilities
KEY = "STROP_TEACHER_KEY"  # environment variable with the API key of a server
REQUESTS = 8  # concurrent requests to a server
REASONING_BEGINS, REASONING_ENDS = ("<think>",), ("</think>",)

LOG = logging.getLogger(__name__)


def teacher_weight(train: TrainSection) -> float:
    """Return train.teacher_weight: by default DEFAULT_WEIGHT, 1 for grpo, or 0 for a server."""
    if train.teacher_weight is not None:
        return train.teacher_weight
    if train.objective == "grpo":
        return 1.0
    return 0.0 if is_address(str(train.teacher)) else DEFAULT_WEIGHT


def teacher_temperature(train: TrainSection) -> float:
    return train.teacher_temperature or 1.0


class Teacher:
    """The model that train.teacher names. Its weights are loaded when they are first needed."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        """Find the teacher. tokenizer: that of the student. Raises InputError for one that cannot teach it."""
        assert recipe.train.teacher is not None
        self.name, self._recipe = recipe.train.teacher, recipe
        self.on_server = is_address(self.name)
        self.received: dict[int, Answer | NoAnswer] = {}  # answers of a server, of the current call
        self._loaded: Model | None = None
        self._student_tokenizer = tokenizer
        if self.on_server:
            self.key = f"{self.name} {recipe.train.teacher_model}"
            if teacher_weight(recipe.train):
                self.key += f" {TOP_LOGPROBS} {sha256_text(json.dumps(tokenizer.get_vocab(), sort_keys=True))}"
            return
        folder = adapter_folder(self.name)
        if folder is not None:
            check_adapter_kind(folder, "text")
        source = locate(self.name) if folder is None else locate_base(folder)
        self.system: str | None = model_identity(folder, source).get("system")  # of all its training rows
        files, limits = _hash_settings(source.path, folder), [recipe.model.device, recipe.data.max_length]
        self.key = json.dumps([*model_key(source, folder), files, *limits, self.system])
        if teacher_weight(recipe.train):
            _check_vocabulary(self.name, tokenizer, folder, source)

    def answer(self, rows: Sequence[Conversation]) -> Answers:
        """Return the answer to each row, without its reasoning."""
        LOG.info("train.teacher: answering 0 of %d rows", len(rows))
        answers = self._ask_server(rows) if self.on_server else self._generate(rows)
        return {key_of(row): answer for row, answer in zip(rows, answers, strict=True)}

    def answer_in_parts(self, rows: Sequence[Conversation], file: Path) -> Answers:
        """Return `answer`. The answers of a server are kept in a file if a later request fails, and read from it."""
        answered = dict(read_answers(file)) if file.is_file() else {}
        left = [row for row in rows if key_of(row) not in answered]
        try:
            answered |= self.answer(left)
        except BaseException:  # also Ctrl-C
            answered |= self.received
            if answered:
                write_atomic(file, write_answers(answered))
                LOG.warning("train.teacher: %d answers are kept; the same command asks for the others", len(answered))
            raise
        file.unlink(missing_ok=True)
        return {key_of(row): answered[key_of(row)] for row in rows}

    def _generate(self, rows: Sequence[Conversation]) -> list[Answer | NoAnswer]:
        from strop.engine.decode.generate import generate

        model, limit = self._load(), self._recipe.data.max_length
        prompts, invalid = [], []
        for row in rows:
            try:
                prompts.append(model.renderer.prompt(self._with_system(row).messages, row.tools))
            except RenderError as error:
                invalid.append(Location(row.file, row.line, error.what))
        if invalid:
            fix = "fix these rows, or choose another teacher"
            raise DataError(f"{len(invalid)} rows are no prompts for the teacher", fix=fix, where=invalid)
        answers = generate(
            model.module, model.tokenizer, prompts, stop_ids=model.renderer.end_ids, max_new_tokens=limit,
            advance=lambda done: LOG.info("train.teacher: answering %d of %d rows", done, len(rows)),
        )  # fmt: skip
        cut = NoAnswer(f"the teacher's answer does not end within {limit} tokens (data.max_length)")
        ends = (*model.renderer.reasoning_ends, *REASONING_ENDS)
        return [_without_reasoning(answer.text, ends) if answer.stopped else cut for answer in answers]

    def _with_system(self, row: Conversation) -> Conversation:
        """Return the row with the system prompt of the teacher's training rows, if it has none."""
        if self.system is None or row.text is not None or any(message.role == "system" for message in row.messages):
            return row
        return replace(row, messages=(Message("system", self.system), *row.messages))

    def _ask_server(self, rows: Sequence[Conversation]) -> list[Answer | NoAnswer]:
        server = ChatServer("teacher", self.name, KEY, self._recipe.train.teacher_model)
        if self._recipe.train.teacher_model is None and len(names := server.models()) > 1:
            what = f"--train.teacher {self.name}: has {len(names)} models: {', '.join(names[:8])}"
            raise RecipeError(what, fix="choose one with --train.teacher_model")
        LOG.info("train.teacher: %s answers", server.model)
        reader = TokenReader(self._student_tokenizer) if teacher_weight(self._recipe.train) else None

        def ask(row: Conversation) -> Answer | NoAnswer:
            answer = request(row)
            if isinstance(answer, Answer):  # another try may answer the others
                self.received[key_of(row)] = answer
                LOG.info("train.teacher: answering %d of %d rows", len(self.received), len(rows))
            return answer

        def request(row: Conversation) -> Answer | NoAnswer:
            options: dict[str, Any] = {"tools": list(row.tools)} if row.tools else {}
            if reader is not None:
                options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            try:
                choice = server.choose([*map(request_message, row.messages)], **options)
            except RequestRefused as error:
                return NoAnswer(error.what)
            if (text := whole_text(choice)) is None:
                return NoAnswer("the server gave no whole text: it was cut, filtered, or a call of a tool")
            answer = _without_reasoning(text, REASONING_ENDS)
            if reader is None or isinstance(answer, NoAnswer):
                return answer
            return replace(answer, tokens=reader.read(choice, answer.text))

        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(ask, rows))

    def distributions(self, data: Prepared) -> Distributions:
        """Return the TOP_K most likely tokens for each supervised token of the training rows."""
        rows, vocabulary = self._rewrite(data), len(data.renderer.tokenizer)
        message = "computing the probabilities of train.teacher: %d of %d rows"
        temperature = teacher_temperature(self._recipe.train)
        found = find_distributions(rows, self._load().module, TOP_K, message, temperature)
        for i, column in np.argwhere(found["ids"] >= vocabulary):  # the teacher's embedding may have unused rows
            found["ids"][i, column] = next(token for token in range(vocabulary) if token not in found["ids"][i])
            found["probs"][i, column] = -1
        return found

    def _rewrite(self, data: Prepared) -> list[Example]:
        """Return the training rows as the teacher reads them: with its system prompt, and the same labels."""
        rows, both = list(data.train), dict[int, tuple[Conversation, Conversation]]()  # rows with another prompt
        for i in range(len(rows) if self.system is not None else 0):
            own = data.train.conversation(i)
            if (other := self._with_system(own)) is not own:
                both[i] = (own, other)
        lost = 0
        rendered = data.renderer.render_many(conversation for pair in both.values() for conversation in pair)
        for i, (_, own_examples), (_, others) in zip(both, rendered, rendered, strict=True):
            same = _find_same(rows[i], own_examples, others)
            rows[i], lost = same or rows[i], lost + (same is None)
        if lost:  # the template has no system prompts, a row was cut to data.max_length, or data.loss is all
            LOG.warning("train.teacher: its probabilities for %d rows are without its system prompt", lost)
        return rows

    def for_policy(self, data: Prepared) -> PolicyTeacher:
        """Return the teacher of sampled completions of these prompts. Its weights stay in memory."""
        prompts: dict[bytes, Ids] = {}
        for examples, conversations in ((data.train, data.train_conversations), (data.eval, data.eval_conversations)):
            rows = [] if self.system is None else [self._with_system(row) for row in conversations or ()]
            for example, (_, rendered) in zip(examples or (), render_prompts(data.renderer, rows), strict=False):
                if not isinstance(rendered, RenderError):
                    prompts[example.ids.tobytes()] = rendered[0].ids
        return PolicyTeacher(step_for(self._load().module.requires_grad_(False).eval()), prompts)

    def _load(self) -> Model:
        from strop.engine.decode.model import load

        if self._loaded is None:
            LOG.info("loading train.teacher %s", self.name)
            self._loaded = load(self.name, device=self._recipe.model.device)
        return self._loaded


def _find_same(row: Example, own: list[Example] | RenderError, others: list[Example] | RenderError) -> Example | None:
    """Return the one of `others` that is at the row's place in `own`: the same labels after another prompt.

    own, others: the examples of a conversation, of which the row is one, without and with a system prompt.
    """
    if isinstance(own, RenderError) or isinstance(others, RenderError) or len(own) != len(others):
        return None
    same = (other for mine, other in zip(own, others, strict=True) if np.array_equal(mine.ids, row.ids))
    other = next(same, None)
    return other if other is not None and np.array_equal(_labels(other), _labels(row)) else None


def _labels(example: Example) -> Ids:
    return example.ids[example.weights > 0]


def _without_reasoning(text: str, ends: Sequence[str]) -> Answer | NoAnswer:
    """Return an answer without its reasoning, which the student's template may show in another way, or not at all."""
    answer = strip_reasoning(text, ends)
    if any(begin in answer for begin in REASONING_BEGINS):
        return NoAnswer("the teacher's reasoning does not end")
    return Answer(answer) if answer.strip() else NoAnswer("the teacher's answer is empty")


def _hash_settings(*folders: Path | None) -> str:
    """Return a hash of the files that decide how a model answers, such as its tokenizer and chat template."""
    files = (file for folder in folders if folder is not None and folder.is_dir() for file in sorted(folder.iterdir()))
    chosen = [file for file in files if file.suffix in (".json", ".jinja", ".model", ".txt")]
    return sha256_text(" ".join(f"{file.name} {sha256_file(file)}" for file in chosen))


@dataclass(frozen=True)
class PolicyTeacher:
    """A teacher of sampled completions. prompts: its tokens for a prompt, by the student's tokens as bytes."""

    step: Step
    prompts: Mapping[bytes, Ids]

    def rewrite(self, example: Example) -> Example:
        """Return a completion with the teacher's prompt, where that is another one than the student's."""
        begin = example.prompt_length
        prompt = self.prompts.get(example.ids[:begin].tobytes())
        if prompt is None:
            return example
        weights = np.concatenate([np.zeros(len(prompt), np.float32), example.weights[begin:]])
        return replace(example, ids=np.concatenate([prompt, example.ids[begin:]]), weights=weights)


class SoftRows(LazySequence[Example]):
    """Rows with a teacher's distributions next to their labels. train: its weight and temperature."""

    def __init__(self, rows: Examples, distributions: Distributions, train: TrainSection) -> None:
        self._rows, self._distributions = rows, distributions
        self._weight, self._temperature = teacher_weight(train), teacher_temperature(train)
        self._ends = np.cumsum(rows.supervised)
        probs = distributions["probs"]
        known = ~lacks_probabilities(probs)
        self.known = float(known.mean())  # share of the tokens that have probabilities
        self.held = float(np.maximum(probs[known], 0).sum(1).mean()) if known.any() else 0.0  # mean of what is kept

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, i: int) -> Example:
        row = self._rows[i]
        span = slice(int(self._ends[i]) - row.supervised, int(self._ends[i]))
        ids, probs = self._distributions["ids"][span], self._distributions["probs"][span]
        return soften(row, ids, probs, self._weight, self._temperature)


def add_teacher(recipe: Recipe, tokenizer: Any, prepare: Callable[[Answers], Prepared], folder: RunFolder) -> Prepared:
    """Return the data with the teacher's answers, and its probabilities as labels.

    The teacher is not needed for what the run folder has already. What is new is written into it, or, if the folder has
    a run, is `pending` in the result until the run is resumed.

    Args:
        tokenizer: that of the student.
        prepare: prepares the rows with answers.
        folder: that of the run.
    """
    pending: dict[Path, bytes] = {}
    store = pending.__setitem__ if folder.lock.is_file() else write_atomic

    def hash_file(file: Path) -> str:
        return sha256(pending[file]).hexdigest() if file in pending else sha256_file(file)

    file = folder.teacher
    rows, weight, name = list_unanswered(recipe.data), teacher_weight(recipe.train), str(recipe.train.teacher)
    _check_options(name, weight, has_rows=bool(rows))
    find_teacher = lru_cache(partial(Teacher, recipe, tokenizer))
    answers = _read_or_ask(find_teacher, rows, file, store)
    data, checksum = replace(prepare(answers), answers=answers, pending=pending), hash_file(file)
    if not weight:
        return replace(data, teacher_hash=checksum)
    temperature = teacher_temperature(recipe.train)
    kind = f"{TOP_LOGPROBS} {checksum}" if is_address(name) else f"{TOP_K}" + f" {temperature}" * (temperature != 1)
    stored, key = file.with_suffix(".safetensors"), sha256_text(f"{data.hash} {kind}")
    distributions = read_or_compute(
        stored, key, int(data.train.supervised.sum()),
        lambda: cache_folder() / "teacher" / f"{sha256_text(f'{key} {find_teacher().key}')[:32]}.safetensors",
        lambda: read_distributions(data.train, answers, data.renderer) if is_address(name) else
        find_teacher().distributions(data),
        store,
    )  # fmt: skip
    items = SoftRows(data.train, distributions, recipe.train)
    return replace(data, train_items=items, teacher_hash=sha256_text(f"{checksum} {hash_file(stored)}"))


def find_policy_teacher(recipe: Recipe, tokenizer: Any) -> Teacher | None:
    """Return the teacher of a policy objective, or None. tokenizer: that of the student. Raises InputError."""
    name = recipe.train.teacher
    if name is None or recipe.train.objective == "sft":
        return None
    if is_address(name):
        check_address("--train.teacher", name, KEY)
        what = f"--train.teacher {name}: a server does not give the probabilities of sampled completions"
        raise RecipeError(what, fix="give a model or a run")
    if not teacher_weight(recipe.train):
        raise RecipeError("--train.teacher_weight 0: the teacher has no effect", fix="leave the teacher out")
    return Teacher(recipe, tokenizer)


def _check_options(name: str, weight: float, *, has_rows: bool) -> None:
    """Raise RecipeError for an address with a password, and if the teacher has nothing to do."""
    if is_address(name):
        check_address("--train.teacher", name, KEY)
        if weight and not has_rows:
            what = (
                f"--train.teacher {name}: all rows have an answer, and a server gives the probabilities of its own only"
            )
            raise RecipeError(what, fix="leave it out, or give rows without an answer")
    if not has_rows and not weight:
        what = f"--train.teacher {name}: all rows have an answer, and the weight of its probabilities is 0"
        raise RecipeError(what, fix="leave it out, or give rows without an answer")


def _read_or_ask(
    find_teacher: Callable[[], Teacher], rows: Sequence[Conversation], file: Path, store: Callable[[Path, bytes], None]
) -> Answers:
    """Return the answers in the file of the run. What is not there is cached, or answered now, and stored."""
    known = read_answers(file) if file.is_file() else {}
    if missing := [row for row in rows if key_of(row) not in known]:
        teacher = find_teacher()
        key = sha256_text(f"{teacher.key} {[key_of(row) for row in missing]}")
        cached = cache_folder() / "teacher" / f"{key[:32]}.jsonl"
        if not cached.is_file() or teacher.on_server:  # a server may have another model next time
            cached.parent.mkdir(parents=True, exist_ok=True)
            answers = teacher.answer_in_parts(missing, cached.with_suffix(".part"))
            write_atomic(cached, write_answers(answers))
        known = {**known, **read_answers(cached)}
    if not file.is_file() or missing:
        store(file, write_answers(known).encode())
    return known


def _check_vocabulary(name: str, tokenizer: Any, folder: Path | None, source: Source) -> None:
    """Raise RecipeError if the teacher's tokens are not those of the student."""
    own = load_tokenizer(source if folder is None else locate_tokenizer(folder, source))
    if own.get_vocab() != tokenizer.get_vocab():
        what = f"--train.teacher {name}: has another vocabulary, so its probabilities are of other tokens"
        fix = "choose a teacher of the same family, or train on its answers alone: --train.teacher_weight 0"
        raise RecipeError(what, fix=fix)
