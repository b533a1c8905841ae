"""The tests that fail on Memberwise and are right to, by reason; what has become needless is an error."""

from __future__ import annotations

_API = "test_vmap.py::TestVmapAPI::"
_OPERATORS = "test_vmap.py::TestVmapOperators::"
_RANDOM = "test_vmap.py::TestRandomness*::"
_NESTED = "test_vmap.py::TestVmapNestedTensor*::"
_FUNCTIONS = "test_eager_transforms.py::TestAutogradFunctionVmapAPI*::"
_COMPOSED = "test_eager_transforms.py::TestComposability*::"

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "expects an error where torch.vmap cannot go on; Memberwise gives each member's lone result": (
        _API + "test_data_attribute",
        _API + "test_data_dependent_control_flow_throws",
        _API + "test_item_throws",
        _API + "test_non_tensor_output_raises",
        _API + "test_unsupported_op_err_msg",
        _OPERATORS + "test_copy_",
        _OPERATORS + "test_fill_and_zero_inplace",
        _OPERATORS + "test_is_contiguous",
        _COMPOSED + "test_autograd_functional_*_inside_transform_*",
        _COMPOSED + "test_requires_grad_inside_transform_*",
    ),
    "expects an error for draws that torch.vmap refuses; Memberwise draws as the members do alone, or alike": (
        _RANDOM + "test_bernoulli_in_place_*_randomness_different_batched_input_none_*",
        _RANDOM + "test_bernoulli_in_place_*_randomness_same_*_batched_probability_first_*",
        _RANDOM + "test_bernoulli_in_place_*_randomness_same_*_batched_probability_last_*",
        _RANDOM + "test_multinomial_*_randomness_same_*_batched_input_first_*",
        _RANDOM + "test_multinomial_*_randomness_same_*_batched_input_last_*",
        _RANDOM + "test_random_binary_out_of_place_*_randomness_same_*first*",
        _RANDOM + "test_random_binary_out_of_place_*_randomness_same_*last*",
        _RANDOM + "test_random_unary_inplace_*_randomness_different_batched_input_none_*",
        _RANDOM + "test_random_unary_out_of_place_*_randomness_same_batched_input_first_*",
        _RANDOM + "test_random_unary_out_of_place_*_randomness_same_batched_input_last_*",
        _RANDOM + "test_unsupported_random_*",
    ),
    "expects what `normal_` draws into other memory; where members lie interleaved it draws other numbers, alone too": (
        _RANDOM + "test_random_unary_inplace_*_randomness_same_batched_input_last_*",
    ),
    "asks for words, or the type, of an error of torch's batching; Memberwise raises the lone run's error": (
        _OPERATORS + "test_as_strided",
        _OPERATORS + "test_clone",
        _OPERATORS + "test_mm",
        _OPERATORS + "test_squeeze",
        "test_vmap.py::TestVmapBatchedGradient*::test_where_*",
    ),
    "maps over a dimension of size 0; Memberwise has no member to run, and says so [MW201]": (
        _API + "test_fallback_zero_dim",
    ),
    "asks for the very tensor where Memberwise returns a view of it, or for strides of a tensor without elements": (
        _OPERATORS + "test_contiguous",
        _OPERATORS + "test_transpose",
        _OPERATORS + "test_new_empty_strided",
    ),
    "maps over a nested tensor, which Memberwise refuses by name [MW204]": (
        _NESTED + "test_cat_*",
        _NESTED + "test_fallback_*",
        _NESTED + "test_nt_*",
        _NESTED + "test_multilevel_vmap_raises_*",
    ),
    "asks for what an `autograd.Function` needs under torch.vmap (a `vmap` staticmethod, `setup_context`); Memberwise "
    "runs the Function as it is": (
        _FUNCTIONS + "test_has_vmap_staticmethod_and_has_generate_vmap_rule_*",
        _FUNCTIONS + "test_incompatible_out_dims_error_msg_*",
        _FUNCTIONS + "test_kwarg_only_tensors_*",
        _FUNCTIONS + "test_no_vmap_staticmethod_and_no_generate_vmap_rule_*",
        _FUNCTIONS + "test_should_have_two_returns_*",
        _COMPOSED + "test_autograd_function_no_setup_context_transform_vmap_*",
        "test_vmap.py::TestTransformFailure*::test_fails_with_autograd_function_transform_vmap_*",
    ),
    "looks into torch's own wrapper: how a BatchedTensor prints, what `debug_unwrap` takes off": (
        "test_eager_transforms.py::TestGradTransform*::test_tensor_print_vmap*",
        "test_eager_transforms.py::TestHelpers*::test_debug_unwrap_*",
    ),
    "asks for the warning that a name of torch's is deprecated": (_COMPOSED + "test_deprecation_vmap_*",),
}
"""By reason: patterns of test names (`fnmatch`)."""
