"""Print the table of the README's section on how far λ_min can be trusted."""

from lplr_jax.experiments.trust import as_markdown, measure

if __name__ == "__main__":
    print(as_markdown(measure()))
