"""The mutations fit the package as it is."""
import mutations


def test_what_a_mutation_replaces_occurs_once():
    mutations.check(mutations.MUTATIONS)
