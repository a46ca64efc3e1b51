"""The rules that `tools/mutation_check.py` breaks, one at a time: a line of the sources and what
stands there instead."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`changes_nothing` says why no test can notice, where that is so."""

    file: str
    old: str
    new: str
    changes_nothing: str = ""


MUTANTS = (
    Mutant(
        "zppo/scheduling/stages.py",
        'reply.texts[0] if reply.finish_reasons[0] != "length" else None',
        "reply.texts[0]",
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        "reward=0.0, answer=answer, note=note, failed=failed, undecided=not failed",
        "reward=0.0, note=note, failed=failed, undecided=not failed",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "visit.accuracy < recipe.hard_threshold",
        "visit.accuracy <= recipe.hard_threshold",
    ),
    Mutant(
        "protocol/zppo_protocol/values.py",
        "math.floor(share * count + 1e-9)",
        "math.ceil(share * count)",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "return visit.plain.done and is_hard(visit, recipe)",
        "return visit.plain.done",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "key=lambda visit: visit.accuracy)[:limit]",
        "key=lambda visit: -visit.accuracy)[:limit]",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "key=lambda visit: visit.accuracy)[:limit]",
        "key=lambda visit: visit.accuracy)",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "any(_admitted(visit, recipe))], limit)",
        "any(_admitted(visit, recipe))], len(hard))",
        "the post-cap keeps the same groups",
    ),
    Mutant("zppo/algorithm/steps.py", "return walk[:limit]", "return walk"),
    Mutant("zppo/algorithm/steps.py", "return walk[:limit]", "return walk[:limit + 1]"),
    Mutant(
        "zppo/algorithm/steps.py",
        "limit = recipe.reformulated(window.new_count, len(hard))",
        "limit = recipe.reformulated(len(window.visits), len(hard))",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "return share_of(self.rho_replay, new_questions) if self.method.replay else 0",
        "return share_of(self.rho_replay, new_questions)",
        "without replay the buffer stays empty",
    ),
    Mutant("zppo/algorithm/steps.py", "    for entry in buffer.evict():", "    for entry in []:"),
    Mutant(
        "zppo/algorithm/steps.py",
        "pre_cap(hard, recipe, limit), recipe",
        "pre_cap(window.visits, recipe, limit), recipe",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "    if not recipe.method.replay:\n        return []",
        "    if False:\n        return []",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "question, accuracy = visit.question, visit.accuracy",
        "question, accuracy = visit.question, max(g.accuracy for g in visit.student_groups())",
    ),
    Mutant(
        "zppo/algorithm/reformulations.py",
        'right = candidate("teacher", visit.teacher, rng.choice(_correct_teacher(visit)))',
        'right = candidate("teacher", visit.teacher, rng.randrange(len(visit.teacher.grades)))',
    ),
    Mutant(
        "zppo/algorithm/reformulations.py",
        "rng.choice(visit.plain.found_wrong())",
        "rng.choice(range(len(visit.plain.grades)))",
    ),
    Mutant(
        "zppo/algorithm/reformulations.py",
        "for index in visit.plain.found_wrong()]\n",
        "for index in visit.plain.found_wrong()[:2]]\n",
    ),
    Mutant(
        "zppo/algorithm/window.py",
        "return [index for index in wrong if not self.the_grades[index].undecided]",
        "return wrong",
    ),
    Mutant(
        "zppo/algorithm/reformulations.py",
        'return candidate("teacher", visit.teacher, rng.choice(_correct_teacher(visit)))',
        'return candidate("teacher", visit.teacher, 0)',
    ),
    Mutant("zppo/algorithm/reformulations.py", "rng.shuffle(shown)", "pass"),
    Mutant(
        "zppo/algorithm/reformulations.py", "return bool(_correct_teacher(visit)) and", "return"
    ),
    Mutant(
        "zppo/scheduling/pacing.py",
        "return window <= horizon + self.lead",
        "return window <= horizon + self.max_staleness + 1",
    ),
    Mutant("zppo/scheduling/pacing.py", "return max(0, window - self.max_staleness)", "return 0"),
    Mutant(
        "zppo/scheduling/scheduler.py",
        "return min(self.trained, self.published)",
        "return self.published",
    ),
    Mutant(
        "zppo/scheduling/free_workers.py",
        "if best is not None and -best[0] >= cost else None",
        "if best is not None else None",
    ),
    Mutant("zppo/scheduling/free_workers.py", " if version >= min_version else None", ""),
    Mutant(
        "zppo/data/cursor.py",
        "if question_id in in_flight or question_id in taken:",
        "if question_id in taken:",
    ),
    Mutant(
        "zppo/data/cursor.py",
        "self._deferred = [*taken.values(), *self._deferred]\n            return []",
        "return []",
    ),
    Mutant("zppo/scheduling/scheduler.py", "cursor=self.cursor.state(),", "cursor=CursorState(),"),
    Mutant(
        "zppo/scheduling/scheduler.py",
        "windows=[self.windows[index] for index in sorted(self.windows)],",
        "windows=[],",
    ),
    Mutant(
        "zppo/algorithm/replay_buffer.py",
        "for question_id in state.available:",
        "for question_id in [e.question.id for e in state.entries]:",
    ),
    Mutant(
        "zppo/algorithm/replay_buffer.py",
        "self._remove(next(iter(self._entries)))",
        "self._remove(next(reversed(self._entries)))",
    ),
    Mutant("zppo/scheduling/dispatch.py", "        self._queue_again(expired)\n", ""),
    Mutant(
        "zppo/scheduling/dispatch.py",
        "return self._queue_again(old)",
        "return [lease.task_id for lease in old]",
    ),
    Mutant(
        "zppo/scheduling/scheduler.py",
        "return self.evaluation.step if self.evaluation is not None else 0",
        "return 0",
    ),
    Mutant("zppo/scheduling/scheduler.py", "evaluated=list(self.evaluated),", "evaluated=[],"),
    Mutant(
        "zppo/algorithm/replay_buffer.py",
        "available=list(self._available)",
        "available=sorted(self._available)",
    ),
    Mutant("zppo/scheduling/scheduler.py", "        if reason is not None:", "        if False:"),
    Mutant(
        "zppo/scheduling/admission.py",
        "if largest < bounds.vocabulary:",
        "if largest <= bounds.vocabulary:",
    ),
    Mutant("zppo/scheduling/admission.py", "oldest <= version <= newest", "version <= newest"),
    Mutant("zppo/scheduling/admission.py", "oldest <= version <= newest", "oldest <= version"),
    Mutant(
        "zppo/scheduling/admission.py", "longest > task.sampling", "longest - 1 > task.sampling"
    ),
    Mutant(
        "zppo/scheduling/scheduler.py",
        "            if name not in self.targets:\n",
        "            if True:\n",
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        "        self.advance_group(visit.teacher, visit.question)\n        if",
        "        if",
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        "            if response not in group.verdicts:",
        "            if True:",
    ),
    # ---- Algorithms 2 to 6 and our options -------------------------------------------------------
    Mutant("zppo/algorithm/methods/off_distill.py", 'teacher_draws="all"', 'teacher_draws="hard"'),
    Mutant("zppo/algorithm/methods/hint.py", 'teacher_draws="selected"', 'teacher_draws="hard"'),
    Mutant("zppo/algorithm/methods/prefix.py", 'teacher_draws="selected"', 'teacher_draws="all"'),
    Mutant("zppo/algorithm/methods/off_distill_replay.py", "    replay=True,\n", ""),
    Mutant("zppo/algorithm/methods/on_distill.py", "updates_per_step=1", "updates_per_step=None"),
    Mutant(
        "zppo/algorithm/steps.py",
        "            return visit.selected\n",
        "            return visit.plain.done\n",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "hard = hard_visits(window, recipe)\n    chosen",
        "hard = list(window.visits)\n    chosen",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "chosen = hardest(hard, recipe.reformulated(window.new_count, len(hard)))",
        "chosen = hard",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "chosen = hardest(hard, recipe.reformulated(window.new_count, len(hard)))",
        "chosen = hard[: recipe.reformulated(window.new_count, len(hard))]",
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        '                select(window, self._recipe)\n                window.phase = "selected"',
        '                window.phase = "selected"',
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        '                add_reformulations(window, self._recipe)\n                window.phase = "reformulated"',
        '                window.phase = "reformulated"',
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        '                select(window, self._recipe)\n                window.phase = "selected"',
        "                select(window, self._recipe)\n                add_reformulations(window, self._recipe)\n"
        '                window.phase = "reformulated"',
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "min(hard_questions, share_of(self.rho_aug_max, new_questions))",
        "share_of(self.rho_aug_max, new_questions)",
    ),
    Mutant("zppo/algorithm/steps.py", "return max(least, min(hard_", "return max(0, min(hard_"),
    Mutant(
        "zppo/algorithm/steps.py",
        "        if self.rho_aug_max is None:\n",
        "        if True:\n",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "if not (recipe.dynamic_sampling and all_same(groups)):",
        "if not all_same(groups):",
    ),
    Mutant(
        "zppo/algorithm/steps.py",
        "if not (recipe.dynamic_sampling and all_same(groups)):",
        "if groups:",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "return all(len(set(composition.rewards.tolist())) <= 1 for composition in compositions)",
        "return any(len(set(composition.rewards.tolist())) <= 1 for composition in compositions)",
    ),
    Mutant(
        "zppo/algorithm/steps.py", "        if recipe.merge_candidates:\n", "        if True:\n"
    ),
    Mutant(
        "zppo/algorithm/steps.py", "        if recipe.merge_candidates:\n", "        if False:\n"
    ),
    Mutant("zppo/algorithm/reformulations.py", "NEAR = 0.8", "NEAR = 0.7"),
    Mutant(
        "zppo/algorithm/reformulations.py",
        "longer = max(mine.total(), others.total())",
        "longer = min(mine.total(), others.total())",
    ),
    Mutant(
        "zppo/algorithm/reformulations.py", "            twin.count += 1\n", "            pass\n"
    ),
    Mutant(
        "zppo/algorithm/reformulations.py",
        "(one.source, one.correct, one.answer) != ",
        "(one.source, one.correct, other.answer) != ",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "plain.members[rng.choice(wrong)]",
        "plain.members[rng.randrange(len(plain.members))]",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "plain.members[rng.choice(wrong)]",
        "plain.members[wrong[0]]",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "plain.members[rng.choice(wrong)] = (visit.teacher, rng.choice(right))",
        "plain.members.append((visit.teacher, rng.choice(right)))",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "(visit.teacher, rng.choice(right))",
        "(visit.teacher, rng.randrange(len(visit.teacher.rewards)))",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "for index in right]",
        "for index in range(len(visit.teacher.rewards))]",
    ),
    Mutant("zppo/algorithm/composition.py", "for index in right]", "for index in right[:1]]"),
    Mutant(
        "zppo/algorithm/composition.py",
        "np.concatenate([versions_T for _, _, versions_T, _ in parts])",
        "np.maximum(np.concatenate([versions_T for _, _, versions_T, _ in parts]), 0)",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "if group is not visit.teacher)\n",
        "if group is visit.teacher)\n",
    ),
    Mutant(
        "zppo/algorithm/composition.py",
        "    if _is_all_of(composition, asked):\n        return asked.the_samples.without_texts()",
        "    first = composition.members[0][0]\n    if _is_all_of(composition, first):\n"
        "        return first.the_samples.without_texts()",
    ),
    Mutant(
        "zppo/algorithm/composition.py", "scores=visit.scores.get(composition.id),", "scores=None,"
    ),
    Mutant(
        "zppo/scheduling/stages.py",
        "if tokens and composition.id not in visit.scores:",
        "if tokens:",
    ),
    Mutant(
        "zppo/scheduling/jobs.py",
        "temperature=self._student.temperature or 1.0,",
        "temperature=1.0,",
    ),
    Mutant(
        "zppo/scheduling/jobs.py",
        'return self._teacher is not None and self._teacher.scoring == "remote"',
        "return self._teacher is not None",
    ),
    Mutant("zppo/prompting/prompts.py", "share=self._prefix_share)", "share=0.4)"),
    Mutant(
        "zppo/algorithm/reformulations.py",
        "return prompts.prefix(visit.question, trace)",
        "return prompts.plain(visit.question)",
    ),
    Mutant(
        "zppo/prompting/hints.py",
        "text = answer.sub(BLANK, text) if answer is not None else text",
        "pass",
    ),
    Mutant("zppo/prompting/hints.py", "if not _BOX.search(line))", "if True)"),
    Mutant(
        "zppo/prompting/hints.py",
        "return hint if _says_something(hint) else",
        "return hint if reply else",
    ),
    Mutant("zppo/prompting/hints.py", "words[: max(1, len(words) // 2)]", "words"),
    Mutant("zppo/prompting/hints.py", "[: max_tokens * CHARACTERS_PER_TOKEN]", ""),
    Mutant(
        "zppo/scheduling/stages.py", "        if preparation == WRITE_HINT:", "        if False:"
    ),
    Mutant("zppo/scheduling/stages.py", "visit.failed_teachers.append(visit.teacher)", "pass"),
    Mutant(
        "zppo/algorithm/steps.py",
        "    return not last.indices(correct=True)\n",
        "    return True\n",
    ),
    Mutant("zppo/algorithm/steps.py", 'or recipe.teacher_order != "cascade" or', "or"),
    Mutant(
        "zppo/algorithm/steps.py",
        '    if recipe.teacher_order == "cascade":\n        return 0\n',
        "",
    ),
    Mutant(
        "zppo/records/ledger.py",
        "WHERE origin = 'new'\n",
        "WHERE origin = 'new' AND kind = 'plain'\n",
    ),
    Mutant(
        "actors/zppo_actors/controller/recorder.py",
        "if visit.plain.id not in composed]",
        "if False]",
    ),
)
