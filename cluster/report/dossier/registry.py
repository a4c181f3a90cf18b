"""An entry for a public registry of deployments of differential privacy, in the fields of OpenDP's.

What the run's signed documents say is filled in; what only people know is left empty for them.
"""

from typing import Any

from cluster.report.dossier.sources import Sources


def entry(sources: Sources) -> dict[str, Any]:
    """The entry, as a tree."""
    certificate, clients = sources.certificate, sources.certificate["unit"] == "client"
    plan, claim = certificate["plan"], certificate["headline"]
    return {
        "url_slug": "",
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": {
                "name": sources.word.run,
                "data_curators": [] if clients else list(sources.ledgers),
                "description": f"A language model for the task {sources.word.task}",
                "intended_use": "; ".join(_purposes(sources)),
                "data_product_type": "Machine learning model",
                "data_product_region": "",
                "data_product_sector": "",
                "publication_date": "",
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": "",
                "unprotected_quantities": "declared numbers of training units; who took part in which round",
            },
            "privacy_loss": {
                "privacy_unit": "client" if clients else "training unit of a site",
                "privacy_unit_details": certificate["relation"],
                "privacy_parameters": {"epsilon": claim["epsilon"], "delta": claim["delta"]},
                "privacy_parameters_details": claim["rule"],
            },
            "deployment_model": {
                "model_name": "Central",
                "model_name_details": certificate.get("trusted") or "central at each site, which adds its own noise",
                "trust_assumptions": certificate.get("trusted") or "each site is trusted with its own records alone",
                "release_type": "One release",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "implementation": {
                "mechanisms": f"Gaussian noise on sums of clipped vectors, multiplier {plan['noise_multiplier']:g}",
                "composition": certificate["accountant"],
                "post_processing": "updates are aggregated, and the adapter is published",
                "additional_information": f"plan digest {certificate['plan_digest']}",
            },
        },
    }


def _purposes(sources: Sources) -> list[str]:
    signed = (*sources.ledgers.values(), *sources.clients.values())
    found = (part["mandate"]["terms"]["purpose"] for part in signed if "mandate" in part)
    return list(dict.fromkeys(found))
