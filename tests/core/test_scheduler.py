"""Stories about one scheduler: what is said after each event."""

from __future__ import annotations

import pytest

from elis_gateway.core.job import JobSpec
from elis_gateway.core.policy import FCFS, ISRTF, LAS, SJF, RoundRobin
from elis_gateway.core.slice import SliceEnd, SliceResult
from tests.core.script import MODEL, Stage


class TestOrder:
    def test_first_come_asks_nobody_and_runs_in_order(self):
        s = Stage(FCFS())
        assert s.submit("a") == ["run a on u"]
        assert s.submit("b") == []
        assert s.submit("c") == []
        assert s.finish("a") == ["completed a", "run b on u"]
        assert s.finish("b") == ["completed b", "run c on u"]

    def test_shortest_first_passes_the_long_one(self):
        s = Stage(SJF())
        assert s.submit("a", 10) == ["run a on u", "ask a"]
        s.submit("long", 500)
        s.submit("short", 5)
        assert s.finish("a") == ["completed a", "run short on u"]
        assert s.finish("short") == ["completed short", "run long on u"]

    def test_a_free_slot_waits_for_no_estimate(self):
        s = Stage(SJF(), slots=2)
        actions = s.scheduler.submit(JobSpec("a", MODEL), 0.0)
        assert s.said(actions) == ["run a on u", "ask a"]
        assert not actions[1].pressing
        s.submit("b", 10)
        actions = s.scheduler.submit(JobSpec("c", MODEL), 0.0)
        assert s.said(actions) == ["ask c"]
        assert actions[0].pressing, "it waits, and where is for its length to say"

    def test_a_running_job_s_estimate_is_pressing_while_somebody_waits(self):
        s = Stage(ISRTF(), window=50)
        s.submit("a", 500)
        s.started("a")
        assert not s.scheduler.window_passed(s.slices["a"].id, 50, 1.0)[0].pressing
        s.submit("b", 5000)
        assert s.scheduler.window_passed(s.slices["a"].id, 100, 2.0)[0].pressing

    def test_an_estimate_of_a_job_that_runs_already_is_what_it_is_compared_by(self):
        s = Stage(ISRTF(), window=50)
        s.submit("a")
        s.estimate("a", 5)
        s.submit("b", 50)
        assert s.started("a") == []
        unknown = Stage(ISRTF(), window=50)
        unknown.submit("a")
        unknown.submit("b", 50)
        assert unknown.started("a") == ["preempt a"], "what is not known is taken for long"

    def test_a_call_in_the_engine_s_queue_is_sent_with_its_estimate(self):
        s = Stage(ISRTF(), slots=1, overcommit=1, orders=True)
        assert s.submit("a") == ["run a on u", "ask a"]
        assert s.submit("b") == ["ask b"], "the engine is to order it"
        assert s.estimate("b", 30) == ["run b on u"]

    def test_without_a_predictor_isrtf_is_first_come(self):
        s = Stage(ISRTF(), estimates=False)
        assert s.submit("a") == ["run a on u"]
        s.submit("b", limit=500)
        s.submit("c", limit=5)
        s.started("a")
        assert s.window("a", 50) == []
        assert s.finish("a", 60) == ["completed a", "run b on u"]

    def test_a_higher_class_goes_first_whatever_its_length(self):
        s = Stage(SJF())
        s.submit("a", 10)
        s.submit("short", 1, rank=1)
        s.submit("urgent", 900, rank=0)
        assert s.finish("a") == ["completed a", "run urgent on u"]

    def test_a_better_estimate_moves_a_waiting_job(self):
        s = Stage(SJF())
        s.submit("a", 10)
        s.submit("b", 100)
        s.submit("c", 200)
        assert s.estimate("c", 50) == []
        assert s.finish("a") == ["completed a", "run c on u"]

    def test_gittins_index_orders_where_the_estimate_has_one(self):
        s = Stage(SJF("gittins"))
        s.submit("a", 10)
        s.submit("steady", 300)
        s.submit("gamble")
        s.estimate("gamble", 525, gittins=100)
        assert s.finish("a") == ["completed a", "run gamble on u"]
        by_number = Stage(SJF("mean"))
        by_number.submit("a", 10)
        by_number.submit("steady", 300)
        by_number.submit("gamble")
        by_number.estimate("gamble", 525, gittins=100)
        assert by_number.finish("a") == ["completed a", "run steady on u"]

    def test_missing_estimate_counts_as_what_is_allowed_then_as_the_long_answers_of_the_model(self):
        s = Stage(SJF())
        s.submit("a", 10)
        s.submit("unknown", limit=100)
        s.estimate("unknown", None)
        s.submit("known", 150)
        assert s.finish("a", 10) == ["completed a", "run unknown on u"]
        # One answer of 10 tokens is known by now: an unknown job counts as about that.
        s.submit("other", limit=1000)
        s.estimate("other", None)
        assert s.finish("unknown", 10) == ["completed unknown", "run other on u"]


class TestFixedWindows:
    def test_every_call_asks_for_one_window_and_the_slot_waits_for_the_estimate(self):
        s = Stage(mode="fixed")
        s.submit("a", 120, limit=1000)
        assert s.slices["a"].limit == 50
        assert s.slices["a"].window is None
        s.submit("b", 80)
        assert s.end("a", SliceEnd.WINDOW, 50) == ["ask a"]
        # b does not slip in before a's fresh estimate says who is shorter.
        assert s.estimate("a", 70) == ["run a on u"]
        assert s.end("a", SliceEnd.WINDOW, 100) == ["ask a"]
        assert s.estimate("a", 90) == ["run b on u"]
        assert s.finish("b", 80) == ["completed b", "run a on u"]

    def test_the_last_window_is_what_the_client_still_allows(self):
        s = Stage(mode="fixed")
        s.submit("a", 120, limit=70)
        s.end("a", SliceEnd.WINDOW, 50)
        assert s.slices["a"].limit == 20

    def test_uncontended_goes_straight_on_and_asks_beside(self):
        s = Stage(mode="fixed")
        s.submit("a", 120)
        assert s.end("a", SliceEnd.WINDOW, 50) == ["run a on u", "ask a"]

    def test_rescore_always_waits_even_alone(self):
        s = Stage(mode="fixed", rescore="always")
        s.submit("a", 120)
        assert s.end("a", SliceEnd.WINDOW, 50) == ["ask a"]
        assert s.estimate("a", 70) == ["run a on u"]

    def test_round_robin_takes_turns(self):
        s = Stage(RoundRobin(), mode="fixed")
        s.submit("a")
        s.at(1).submit("b")
        assert s.at(2).end("a", SliceEnd.WINDOW, 50) == ["run b on u"]
        assert s.at(3).end("b", SliceEnd.WINDOW, 50) == ["run a on u"]

    def test_las_serves_who_had_least(self):
        s = Stage(LAS(), mode="fixed")
        s.submit("a")
        s.submit("b")
        assert s.end("a", SliceEnd.WINDOW, 50) == ["run b on u"]
        s.submit("c")
        assert s.end("b", SliceEnd.WINDOW, 50) == ["run c on u"]

    def test_an_unsliceable_job_is_one_call(self):
        s = Stage(mode="fixed")
        s.submit("a", 120, limit=400, sliceable=False)
        assert (s.slices["a"].limit, s.slices["a"].window) == (400, None)

    def test_a_cancelled_job_gives_its_held_slot_back(self):
        s = Stage(mode="fixed")
        s.submit("a", 120)
        s.submit("b", 80)
        assert s.end("a", SliceEnd.WINDOW, 50) == ["ask a"]
        assert s.cancel("a") == ["cancelled a", "run b on u"]

    def test_a_slot_held_for_a_job_that_may_not_return_there_goes_to_who_waits(self):
        s = Stage(mode="fixed", upstreams=[])
        s.upstream("u", 1, models=frozenset({"m", "n"}))
        s.submit("a", 120)
        s.submit("b", 80, model="n")
        assert s.end("a", SliceEnd.WINDOW, 50) == ["ask a"]
        # While the slot is held for a's estimate, u stops serving a's model.
        assert s.upstream("u", 1, models=frozenset({"n"})) == []
        assert s.estimate("a", 70) == ["run b on u"]
        assert s.upstream("v", 1) == ["run a on v"]

    def test_so_does_one_whose_job_found_a_place_elsewhere(self):
        s = Stage(mode="fixed", upstreams=[])
        s.upstream("u", 1, models=frozenset({"m", "n"}))
        s.submit("a", 120)
        s.submit("b", 80, model="n")
        s.end("a", SliceEnd.WINDOW, 50)
        s.upstream("u", 1, models=frozenset({"n"}))
        s.upstream("v", 1)
        assert s.estimate("a", 70) == ["run a on v", "run b on u"]


class TestElastic:
    def test_nobody_waits_so_nobody_yields(self):
        s = Stage()
        s.submit("a", 500)
        assert (s.slices["a"].limit, s.slices["a"].window) == (None, 50)
        s.started("a")
        assert s.window("a", 50, 450) == ["ask a"]

    def test_a_short_arrival_takes_the_slot_at_once(self):
        s = Stage()
        s.submit("a", 500)
        s.started("a")
        assert s.submit("b", 20) == ["ask b", "preempt a"]
        assert s.end("a", SliceEnd.PREEMPTED, 30) == ["run b on u"]
        assert s.finish("b", 20) == ["completed b", "run a on u"]
        assert s.scheduler.jobs["a"].attained == 30

    def test_not_for_less_than_the_seam_costs(self):
        s = Stage(seam_cost=4.0)
        s.submit("a", 500)
        s.started("a")
        assert s.submit("b", 497) == ["ask b"]
        assert s.submit("c", 495) == ["ask c", "preempt a"]

    def test_one_victim_for_one_better_job(self):
        s = Stage(slots=2)
        s.submit("a", 500)
        s.submit("b", 400)
        s.started("a")
        s.started("b")
        assert s.submit("c", 20) == ["ask c", "preempt a"]
        assert s.window("b", 50, 350) == ["ask b"]
        assert s.submit("d", 30) == ["ask d", "preempt b"]
        assert s.submit("e", 10) == ["ask e"]

    def test_never_twice_within_one_window(self):
        s = Stage()
        s.submit("a", 500)
        s.started("a")
        s.submit("b", 20)
        s.end("a", SliceEnd.PREEMPTED, 30)
        s.finish("b", 20)
        s.started("a")
        assert s.submit("c", 20) == ["ask c"]
        assert s.window("a", 80, 420) == ["ask a", "preempt a"]

    def test_a_worse_estimate_of_a_running_job_makes_it_yield(self):
        s = Stage()
        s.submit("a", 100)
        s.started("a")
        s.submit("b", 200)
        assert s.window("a", 50, 900) == ["ask a", "preempt a"]

    def test_an_unsliceable_job_never_yields(self):
        s = Stage()
        s.submit("a", 500, sliceable=False)
        s.started("a")
        assert s.submit("b", 1) == ["ask b"]

    def test_round_robin_yields_at_the_window_only(self):
        s = Stage(RoundRobin())
        s.submit("a")
        s.started("a")
        assert s.at(1).submit("b") == []
        assert s.at(2).window("a", 50) == ["preempt a"]

    def test_a_higher_class_preempts(self):
        s = Stage()
        s.submit("a", 5, rank=1)
        s.started("a")
        assert s.submit("b", 900, rank=0) == ["ask b", "preempt a"]

    def test_an_engine_that_became_slower_makes_nobody_yield_to_a_longer_job(self):
        # The key of "b" was made when a token took a second; by today's pace "a" alone looks longer than it.
        s = Stage(ISRTF())
        s.submit("a", 100)
        s.submit("b", 120)
        s.started("a")
        s.scheduler.pools["m"].seconds_per_token = 8.0
        assert s.window("a", 50, 50) == ["ask a"]
        assert s.submit("c", 10) == ["ask c", "preempt a"]


class TestEngineOrdered:
    def test_calls_beyond_the_slots_carry_the_key(self):
        s = Stage(overcommit=1, orders=True)
        s.submit("a", 500)
        s.started("a")
        assert s.submit("b", 600) == ["ask b", "run b on u"]
        assert s.slices["b"].priority == 600_000
        assert s.submit("c", 700) == ["ask c"]

    def test_a_better_job_replaces_the_call_that_waits_in_the_engine(self):
        s = Stage(overcommit=1, orders=True)
        s.submit("a", 500)
        s.started("a")
        s.submit("b", 700)
        assert s.submit("c", 600) == ["ask c", "preempt b"]
        assert s.end("b", SliceEnd.PREEMPTED, 0) == ["run c on u"]
        assert s.scheduler.jobs["b"].preemptions == 0

    def test_the_engines_head_takes_a_running_slot(self):
        s = Stage(overcommit=1, orders=True)
        s.submit("a", 500)
        s.started("a")
        # The short job is sent first, so that the engine can start it in the step in which a's call is closed.
        assert s.submit("b", 20) == ["ask b", "run b on u", "preempt a"]
        assert s.end("a", SliceEnd.PREEMPTED, 40) == ["run a on u"]
        assert s.started("b") == []

    def test_an_overdue_call_in_the_engines_queue_is_not_taken_back(self):
        s = Stage(overcommit=1, orders=True, tail=1.25)
        s.scheduler.pools["m"].shadow.p99.value = 100.0
        s.submit("a", 5)
        s.started("a")
        assert s.submit("b", 500) == ["ask b", "run b on u"]
        assert s.submit("c", 10) == ["ask c", "preempt b"]
        # Now b is overdue and next in line: to take it back for c would go on for ever.
        assert s.end("b", SliceEnd.PREEMPTED, 0) == ["run b on u"]
        assert s.at(1.0).submit("d", 10, rank=-1) == ["ask d", "preempt b"], "classes stand above the promise"

    def test_an_overdue_job_takes_the_place_of_a_call_that_has_not_begun(self):
        s = Stage(overcommit=1, tail=1.25)
        s.scheduler.pools["m"].shadow.p99.value = 100.0
        s.submit("a", 15)
        s.started("a")
        assert s.submit("b", 20) == ["ask b", "run b on u"]
        assert s.submit("c", 100) == ["ask c"], "longer, and not yet due"
        # c is overdue from now on. It evicts nobody who runs, but is next for a slot: before the call in hand.
        assert s.at(20.0).window("a", 10, 5) == ["ask a", "preempt b"]
        assert s.end("b", SliceEnd.PREEMPTED, 0) == ["run c on u"]
        assert s.finish("a", 15) == ["completed a", "run b on u"]

    def test_a_better_job_takes_the_place_of_the_call_in_hand(self):
        s = Stage(overcommit=1)
        s.submit("a", 100)
        s.started("a")
        assert s.submit("b", 190) == ["ask b", "run b on u"]
        assert s.submit("c", 120) == ["ask c", "preempt b"]
        assert s.end("b", SliceEnd.PREEMPTED, 0) == ["run c on u"]
        assert s.scheduler.jobs["b"].preemptions == 0, "it had not begun"

    def test_time_in_the_engine_s_queue_is_no_slot_time(self):
        s = Stage(overcommit=1)
        s.submit("a", 100)
        s.started("a")
        s.submit("b", 190)
        s.at(30.0).submit("c", 120)
        s.end("b", SliceEnd.PREEMPTED, 0)
        assert s.scheduler.jobs["b"].served == 0.0
        s.at(100.0).finish("a", 100)
        s.started("c")
        s.at(220.0).finish("c", 120)
        s.started("b")
        b = s.scheduler.jobs["b"]
        s.at(410.0).finish("b", 190)
        assert b.served == pytest.approx(190.0)
        assert (b.slices, b.seams) == (2, 0), "the first of its calls never began"

    def test_who_yields_is_not_sent_again_before_the_better_job_has_begun(self):
        s = Stage(overcommit=1)
        s.submit("a", 100)
        s.started("a")
        assert s.submit("b", 20) == ["ask b", "run b on u", "preempt a"]
        assert s.end("a", SliceEnd.PREEMPTED, 1) == [], "it might be there before b"
        assert s.submit("c", 60) == ["ask c"]
        assert s.started("b") == ["run c on u"]
        assert s.finish("b", 20) == ["completed b", "run a on u"]

    def test_the_seam_is_learned_from_when_the_engine_had_a_slot(self):
        s = Stage(overcommit=1, seam_cost=None)
        s.submit("a", 100)
        s.started("a")
        assert s.submit("b", 20) == ["ask b", "run b on u", "preempt a"]
        s.at(1.0).end("a", SliceEnd.PREEMPTED, 1)  # and is in hand again
        s.at(2.0).started("b")
        s.at(22.0).finish("b", 20)
        s.at(27.0).started("a")
        # Its token came four late, counted from b's end; 25 after it was sent.
        assert s.scheduler.seam_tokens == pytest.approx(2.0 + 0.05 * (4.0 - 2.0))

    def test_a_job_that_needs_one_call_stays_in_the_engine_s_queue(self):
        s = Stage(overcommit=1)
        s.submit("a", 100)
        s.started("a")
        s.submit("b", 90, sliceable=False)
        assert s.submit("c", 20) == ["ask c"]

    def test_a_slot_that_comes_free_calls_back_what_waits_in_another_engine_s_queue(self):
        s = Stage(upstreams=("u", "v"), overcommit=1)
        s.submit("a", 100)
        s.submit("b", 100)
        s.started("a"), s.started("b")
        assert s.submit("c", 150)[-1] == "run c on u", "in hand, for want of a better place"
        assert s.finish("b", 100) == ["completed b", "preempt c"]
        assert s.end("c", SliceEnd.PREEMPTED, 0) == ["run c on v"]

    def test_a_call_whose_prefix_is_cached_there_waits_there(self):
        s = Stage(upstreams=("u", "v"), overcommit=1)
        s.submit("first", 10, conversation="talk")
        s.submit("b", 100)
        s.started("first"), s.started("b")
        s.finish("first", 10)
        s.submit("a", 100)
        s.started("a")
        assert s.submit("second", 150, conversation="talk")[-1] == "run second on u"
        assert s.finish("b", 100) == ["completed b"]

    def test_a_class_has_a_promise_of_its_own(self):
        s = Stage()
        s.scheduler.pools["m"].shadow.p99.value = 100.0
        s.submit("a", 10)
        s.started("a")
        assert s.submit("promised", 400, tail=1.0) == ["ask promised"]
        assert s.submit("short", 30) == ["ask short"]
        # Before anything else: whoever has been promised something and is overdue.
        assert s.at(10.0).finish("a", 10) == ["completed a", "run promised on u"]
        s.started("promised")
        assert s.submit("shorter", 5) == ["ask shorter"], "and is not made to yield"
        assert s.at(410.0).finish("promised", 400) == ["completed promised", "run shorter on u"]

    def test_never_more_calls_than_slots_and_overcommit(self):
        s = Stage(slots=2, overcommit=2, orders=True)
        for i in range(10):
            s.submit(f"j{i}", 100 + i)
        assert s.scheduler.running("u") == 4


class TestUpstreams:
    def test_least_loaded_first(self):
        s = Stage(FCFS(), upstreams=("u", "v"), slots=2)
        assert s.submit("a") == ["run a on u"]
        assert s.submit("b") == ["run b on v"]

    def test_a_continuation_goes_home(self):
        s = Stage(mode="fixed", upstreams=("u", "v"))
        s.submit("a", 100)
        s.submit("b", 500)
        assert s.end("b", SliceEnd.WINDOW, 50) == ["run b on v", "ask b"]

    def test_who_is_next_but_has_just_failed_there_keeps_nobody_else_waiting(self):
        s = Stage(FCFS(), upstreams=("u", "v"))
        s.submit("a")
        s.at(1.0).submit("b")
        s.submit("c")
        assert s.end("a", SliceEnd.INTERRUPTED, 0) == ["run c on u"]
        assert s.finish("c") == ["completed c"], "u is left alone by a"
        assert s.finish("b") == ["completed b", "run a on v"]

    def test_many_may_have_failed_there(self):
        s = Stage(FCFS(), upstreams=("u", "v"), slots=8)
        for n in range(16):
            s.submit(f"j{n}")
        for n in range(0, 16, 2):
            s.end(f"j{n}", SliceEnd.INTERRUPTED, 0)
        assert s.submit("late") == ["run late on u"]

    def test_a_call_in_an_engine_s_queue_is_not_fetched_by_the_upstream_that_has_failed_its_job(self):
        s = Stage(FCFS(), upstreams=("u", "v"), slots=2, overcommit=2)
        for n in range(4):
            s.submit(f"j{n}")
        for n in (1, 3):
            s.started(f"j{n}")
        said = [s.end(f"j{n}", SliceEnd.INTERRUPTED, 0) for n in (0, 2)]
        assert said == [["run j0 on v"], ["run j2 on v"]], "and nobody is called back to go to and fro"

    def test_who_may_run_elsewhere_alone_preempts_there(self):
        s = Stage(ISRTF(), upstreams=("u", "v"), slots=1)
        s.submit("x", 100)
        s.submit("short", 80)
        s.started("short")
        s.submit("long", 900)
        s.end("x", SliceEnd.INTERRUPTED, 0)
        s.started("long")
        assert s.estimate("x", 9) == ["preempt short"], "on v: u, where the longer one runs, has just failed it"

    def test_an_interrupted_job_continues_elsewhere_with_what_it_has(self):
        s = Stage(upstreams=("u", "v"), slots=1)
        s.submit("a", 100)
        s.started("a")
        assert s.upstream("u", 0) == []
        assert s.end("a", SliceEnd.INTERRUPTED, 30, "reset") == ["run a on v"]
        assert s.scheduler.jobs["a"].attained == 30

    def test_waiting_jobs_of_a_dead_upstream_pour_back(self):
        s = Stage(upstreams=("u", "v"), slots=1)
        s.submit("a", 500)
        s.started("a")
        s.submit("b", 400)
        s.started("b")
        s.submit("c", 10)
        s.end("a", SliceEnd.PREEMPTED, 60)
        assert s.scheduler.jobs["a"].home == "u"
        s.upstream("u", 0)
        assert s.scheduler.jobs["a"].home is None
        assert s.finish("b", 400) == ["completed b", "run a on v"]

    def test_a_replica_that_fails_a_job_is_left_alone_while_another_is_up(self):
        s = Stage(upstreams=("u", "v"))
        assert "run a on u" in s.submit("a", 100)
        assert "run b on v" in s.submit("b", 50)
        assert s.end("a", SliceEnd.INTERRUPTED, 0, "status_500") == []
        assert s.finish("b", 50) == ["completed b", "run a on v"]
        assert s.end("a", SliceEnd.INTERRUPTED, 0, "status_500") == ["run a on u"]
        # Once the other is down there is no choice left.
        s.end("a", SliceEnd.INTERRUPTED, 0, "status_500")
        assert s.slices["a"].upstream == "v"
        s.end("a", SliceEnd.INTERRUPTED, 10, "status_500")
        assert s.slices["a"].upstream == "u"

    def test_failures_without_progress_are_counted(self):
        s = Stage(retries=1)
        s.submit("a", 100)
        assert s.end("a", SliceEnd.INTERRUPTED, 0, "reset") == ["run a on u"]
        assert s.end("a", SliceEnd.INTERRUPTED, 20, "reset") == ["run a on u"]
        assert s.end("a", SliceEnd.INTERRUPTED, 20, "reset") == ["failed a"]

    def test_without_an_upstream_jobs_wait_then_expire(self):
        s = Stage(FCFS(), unavailable_timeout=30.0)
        s.upstream("u", 0)
        s.at(5).submit("a")
        assert s.scheduler.next_deadline() == 35
        assert s.at(20).upstream("u", 1) == ["run a on u"]
        s.at(21).upstream("u", 0)
        s.end("a", SliceEnd.INTERRUPTED, 10)
        assert s.at(35).tick() == []
        assert s.at(51).tick() == ["expired a"]
        assert s.scheduler.jobs == {}

    def test_a_job_waits_for_its_warm_home_only_while_moving_costs_more(self):
        s = Stage(upstreams=("u", "v"), prefill_tokens_per_second=10.0)
        s.submit("a", 500, prompt_tokens=1000)
        s.started("a")
        s.submit("b", 300)
        s.submit("c", 20)
        assert s.end("a", SliceEnd.PREEMPTED, 60) == ["run c on u"]
        # v is free, but 1,060 tokens at 10 tokens/s cost more than c's 20 seconds.
        assert s.finish("b", 300) == ["completed b"]
        assert s.finish("c", 20) == ["completed c", "run a on u"]

    def test_the_next_turn_goes_where_the_last_one_ran(self):
        s = Stage(FCFS(), upstreams=("u", "v"), slots=2)
        s.submit("x")
        assert s.submit("turn1", conversation="c") == ["run turn1 on v"]
        s.finish("turn1")
        s.submit("y")
        assert s.submit("turn2", conversation="c") == ["run turn2 on v"]


class TestLimits:
    def test_a_full_queue_rejects(self):
        s = Stage(FCFS(), queue_limit=1)
        s.submit("a")
        s.submit("b")
        assert s.submit("c") == ["rejected c"]
        assert "c" not in s.scheduler.jobs

    def test_time_to_live_ends_with_the_first_slot(self):
        s = Stage(FCFS(), queue_ttl=10.0)
        s.submit("a")
        s.submit("b")
        assert s.at(10).tick() == ["expired b"]

    def test_a_shorter_limit_does_not_wait_for_the_longer_ones_before_it(self):
        s = Stage(FCFS(), queue_ttl=300.0)
        s.submit("runs")
        s.submit("long")
        s.dials(queue_ttl=10.0)
        s.at(1).submit("short")
        assert s.scheduler.next_deadline() == 11
        assert s.at(11).tick() == ["expired short"]
        assert s.at(300).tick() == ["expired long"]

    def test_who_may_wait_longer_for_an_upstream_is_still_told_in_the_end(self):
        s = Stage(FCFS(), unavailable_timeout=30.0)
        s.upstream("u", 0)
        s.submit("a")
        s.dials(unavailable_timeout=100.0)
        assert s.at(30).tick() == []
        assert s.scheduler.next_deadline() == 100
        assert s.at(100).tick() == ["expired a"]

    def test_a_deadline_ends_a_running_job_too(self):
        s = Stage(FCFS())
        s.submit("a", deadline=7.0)
        assert s.at(7).tick() == ["abort a", "expired a"]
        assert s.end("a", SliceEnd.PREEMPTED, 3) == []
        assert s.scheduler.jobs == {}

    def test_alarms_of_jobs_that_are_gone_do_not_pile_up(self):
        s = Stage(FCFS())
        for i in range(5000):
            s.submit(f"j{i}", deadline=1e9)
            s.cancel(f"j{i}")
            s.end(f"j{i}", SliceEnd.PREEMPTED, 0)
        assert len(s.scheduler._alarms._deadlines) < 2500


class TestLateNews:
    def test_of_a_finished_job_is_dropped(self):
        s = Stage()
        s.submit("a", 10)
        s.finish("a", 10)
        assert s.estimate("a", 5) == []
        assert s.cancel("a") == []

    def test_cancel_frees_the_slot_when_the_slice_ends(self):
        s = Stage()
        s.submit("a", 10)
        s.submit("b", 10)
        assert s.cancel("a") == ["abort a", "cancelled a"]
        assert s.end("a", SliceEnd.PREEMPTED, 4) == ["run b on u"]

    def test_an_unknown_slice_is_a_bug(self):
        s = Stage()
        with pytest.raises(KeyError):
            s.scheduler.slice_ended(99, SliceResult(SliceEnd.FINISHED, 1), 0.0)

    def test_a_second_job_of_the_same_id_is_a_bug(self):
        s = Stage()
        s.submit("a", 10)
        with pytest.raises(ValueError, match="in use"):
            s.submit("a", 10)


def test_a_new_policy_reorders_what_waits():
    s = Stage(FCFS())
    s.submit("a")
    s.submit("long")
    s.submit("short")
    assert s.said(s.scheduler.set_policy(SJF(), 0.0)) == ["ask long", "ask short"]
    s.estimate("long", 500)
    s.estimate("short", 5)
    assert s.finish("a") == ["completed a", "run short on u"]


def test_seam_cost_is_learned_from_continuations():
    s = Stage(seam_cost=None)
    before = s.scheduler.seam_tokens
    s.submit("a", 500)
    s.started("a")
    s.submit("b", 20)
    s.at(30).end("a", SliceEnd.PREEMPTED, 30)
    s.at(50).finish("b", 20)
    s.at(62).started("a")
    assert s.scheduler.seam_tokens > before


def test_a_window_told_before_the_first_token_still_makes_a_job_yield():
    s = Stage(LAS())
    s.submit("a")
    s.submit("b")
    assert s.window("a", 50) == ["preempt a"]
