"""A silo's policy, applied to what is asked: computed from the request and the settings alone, without reading data."""

import math
from unicodedata import normalize

from configs.errors import InputError, PolicyRefusal
from configs.parse import parse
from configs.schema.silo import SiloPolicy
from configs.schema.tasks import AugmentationSettings
from federated.protocol import silo_pb2 as pb
from federated.silo.local_training import OPTIMIZERS
from federated.silo.masking.terms import check_secure
from federated.silo.requests import json_object
from privacy.accounting.size import check_size
from privacy.plan import METRIC, PlanTerms, PrivacyPlan


def plan_of(text: str) -> PlanTerms:
    """The plan that a run wants to reserve.

    Raises:
        PolicyRefusal: it is none.
    """
    tree = json_object(text)
    try:
        return parse(PlanTerms, tree, "plan")
    except InputError as error:
        raise PolicyRefusal.of("plan", "an inconsistent plan", str(error)) from None


def check_plan(terms: PlanTerms, policy: SiloPolicy, public_record_count: int) -> PrivacyPlan:
    """Every rule for a plan but those for its epsilon.

    Returns:
        The plan, bound to the silo's own size; with clients as units, to their number.

    Raises:
        PolicyRefusal: a rule of the policy, with the value asked for and the value allowed.
    """
    if terms.unit not in policy.units:
        raise PolicyRefusal.of("units", terms.unit, ", ".join(policy.units))
    check_secure(terms, policy)
    if terms.compression is not None and terms.compression.leaves_out and not policy.error_feedback:
        asked = f"{terms.compression.share:g} of an update's values"
        raise PolicyRefusal.of("error_feedback", asked, "all of them: nothing is kept for the next update")
    plan = terms.bind(public_record_count) if terms.unit == "record" else terms.for_clients()
    if not policy.min_grad_norm <= terms.max_grad_norm <= policy.max_grad_norm:
        bounds = f"{policy.min_grad_norm:g} to {policy.max_grad_norm:g}"
        raise PolicyRefusal.of("max_grad_norm", f"{terms.max_grad_norm:g}", bounds)
    if (noise := terms.schedule.noise_multiplier) < policy.min_noise_multiplier:  # what is left of it after rounding
        raise PolicyRefusal.of("min_noise_multiplier", f"{noise:g}", f"{policy.min_noise_multiplier:g}")
    if terms.unit == "record":  # with clients as units each request says how it samples, and how long it trains
        _check_steps(terms.sampling_rate, terms.steps_per_round, policy)
    weakest = min((metric.noise_multiplier for metric in terms.metric_releases), default=math.inf)
    if weakest < policy.min_noise_multiplier:
        raise PolicyRefusal.of("min_noise_multiplier", f"{weakest:g} for a metric", f"{policy.min_noise_multiplier:g}")
    names = sorted({metric.name for metric in terms.metric_releases})
    allowed = [METRIC] if policy.releases_metrics else []
    if not set(names) <= set(allowed):
        raise PolicyRefusal.of("metric_releases", ", ".join(names), ", ".join(allowed) or "none")
    _check_labels(terms, policy)
    longest = max((metric.max_new_tokens for metric in terms.metric_releases), default=0)
    if longest > policy.max_new_tokens:
        raise PolicyRefusal.of("max_new_tokens", f"{longest}", f"{policy.max_new_tokens}")
    _check_rounds(terms, policy)
    return plan


def check_new_plan(terms: PlanTerms, policy: SiloPolicy, public_record_count: int) -> PrivacyPlan:
    """Every rule for a plan that is to be reserved, and a bound on the seconds that computing its epsilon takes.

    Raises:
        PolicyRefusal: as ``check_plan``; or it takes too much to account for.
    """
    plan = check_plan(terms, policy, public_record_count)
    check_size(terms.schedule, new=True)
    return plan


def check_epsilon(epsilon: float, policy: SiloPolicy) -> None:
    """What a whole run spends.

    Raises:
        PolicyRefusal: more than one run may.
    """
    if epsilon > policy.max_epsilon_per_run:
        raise PolicyRefusal.of("max_epsilon_per_run", f"{epsilon:.4g}", f"{policy.max_epsilon_per_run:g}")


def _check_steps(sampling_rate: float, steps: int, policy: SiloPolicy) -> None:
    if sampling_rate > policy.max_sampling_rate:
        raise PolicyRefusal.of("max_sampling_rate", f"{sampling_rate:g}", f"{policy.max_sampling_rate:g}")
    if steps > policy.max_steps_per_round:
        raise PolicyRefusal.of("max_steps_per_round", f"{steps}", f"{policy.max_steps_per_round}")


def _check_rounds(terms: PlanTerms, policy: SiloPolicy) -> None:
    """Each release is an entry of the ledger; an evaluation may follow each round, and come before the first."""
    most, evaluations = policy.max_rounds_per_run, sum(metric.releases for metric in terms.metric_releases)
    if terms.rounds > most:
        raise PolicyRefusal.of("max_rounds_per_run", f"{terms.rounds}", f"{most}")
    if evaluations > most + 1:
        raise PolicyRefusal.of("max_rounds_per_run", f"{evaluations} evaluations", f"{most + 1}")


def check_contribution(asked: pb.Contribute, policy: SiloPolicy) -> None:
    """The work of a round whose update leaves without noise.

    Raises:
        PolicyRefusal: it is none, or more than the policy allows.
    """
    if not (asked.sampling_rate > 0 and asked.local_steps):  # false for a NaN, too
        raise PolicyRefusal.of(
            "contribute", f"{asked.local_steps} steps at {asked.sampling_rate:g}", "above 0, both of them"
        )
    _check_steps(asked.sampling_rate, asked.local_steps, policy)


def _check_labels(terms: PlanTerms, policy: SiloPolicy) -> None:
    """The sets that the steward lists, as sets in Unicode's form NFC: their order decides nothing but ties."""
    allowed = [set(labels) for labels in policy.label_sets]
    for metric in terms.metric_releases:
        composed = {normalize("NFC", label) for label in metric.labels}
        if metric.labels and (len(composed) < len(metric.labels) or composed not in allowed):
            listed = "; ".join(", ".join(labels) for labels in policy.label_sets)
            raise PolicyRefusal.of("label_sets", ", ".join(metric.labels), listed or "none")


def check_model(asked: pb.Train | pb.Evaluate, policy: SiloPolicy, base_model_digest: str) -> None:
    """Base model, task, and what of the model trains.

    Raises:
        PolicyRefusal: one of them is not allowed.
    """
    if asked.base_model_digest != base_model_digest:
        raise PolicyRefusal.of("base_model", asked.base_model_digest, base_model_digest)
    if asked.task not in policy.tasks:
        raise PolicyRefusal.of("task", asked.task, ", ".join(policy.tasks))
    task = policy.task_spec
    if tuple(asked.task_spec.labels) != task.labels:
        raise PolicyRefusal.of("labels", ", ".join(asked.task_spec.labels) or "none", ", ".join(task.labels) or "none")
    if asked.task_spec.template != task.template:
        raise PolicyRefusal.of("template", asked.task_spec.template or "none", task.template or "none")
    if (asked.task_spec.pooling or "model") != task.pooling:
        raise PolicyRefusal.of("pooling", asked.task_spec.pooling or "model", task.pooling)
    spec = asked.adapter_spec
    if (train := spec.train or "lora") not in policy.train:
        raise PolicyRefusal.of("train", train, ", ".join(policy.train))
    if not 1 <= spec.rank <= policy.max_lora_rank:
        raise PolicyRefusal.of("max_lora_rank", str(spec.rank), f"1 to {policy.max_lora_rank}")
    if not 0 < spec.alpha <= policy.max_lora_alpha:
        raise PolicyRefusal.of("max_lora_alpha", f"{spec.alpha:g}", f"above 0, at most {policy.max_lora_alpha:g}")
    if train != "lora" and not asked.adapter:
        raise PolicyRefusal.of("adapter", "none", f"the parameters themselves, since train is {train}")


def check_optimizer(train: pb.Train, policy: SiloPolicy) -> None:
    """How a silo is asked to train.

    Raises:
        PolicyRefusal: it can't.
    """
    if not 0 < train.learning_rate <= policy.max_learning_rate:
        raise PolicyRefusal.of(
            "max_learning_rate", f"{train.learning_rate:g}", f"above 0, at most {policy.max_learning_rate:g}"
        )
    if not 0 <= train.proximal_mu <= policy.max_proximal_mu:
        raise PolicyRefusal.of("max_proximal_mu", f"{train.proximal_mu:g}", f"0 to {policy.max_proximal_mu:g}")
    if (pull := train.learning_rate * train.proximal_mu) > 1:  # after enough such steps nothing is finite
        asked = f"learning_rate {train.learning_rate:g} times proximal_mu {train.proximal_mu:g} is {pull:g}"
        raise PolicyRefusal.of("proximal_mu", asked, "at most 1: a longer step overshoots")
    if train.optimizer not in OPTIMIZERS:
        raise PolicyRefusal.of("optimizer", train.optimizer or "none", ", ".join(OPTIMIZERS))
    _check_augmentation(train.augmentation, policy.max_augmentation)


def _check_augmentation(asked: pb.Augmentation, most: float) -> None:
    for name in AugmentationSettings.model_fields:
        share: float = getattr(asked, name)
        if not 0 <= share <= most:  # true for a NaN, too
            raise PolicyRefusal.of("max_augmentation", f"{share:g} for {name}", f"0 to {most:g}" if most else "0")
