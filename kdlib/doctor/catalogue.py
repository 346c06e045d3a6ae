"""Every fault that the doctor can name: what shows, what causes it, what to do.

`seen` names where it was met: owner/repository#number is an issue on GitHub. Where no
sighting is known, none is given.
"""

from __future__ import annotations

from typing import NamedTuple


class Ailment(NamedTuple):
    symptom: str
    cause: str
    remedy: str
    seen: str = ""


CATALOGUE: dict[str, Ailment] = {}


def _add(name: str, symptom: str, cause: str, remedy: str, seen: str = "") -> None:
    CATALOGUE[name] = Ailment(symptom, cause, remedy, seen)


# --- The batch's views ----------------------------------------------------------------

_add(
    "misaligned_responses",
    "Teacher's and student's views hold different response tokens",
    "responses were tokenised once a side, or rows were paired by count or by order",
    "tokenise the response once, give both sides those ids, and compare row by row",
    "ms-swift's pairing by total count; modelscope/ms-swift#10073",
)
_add(
    "mask_covers_padding",
    "The completion mask covers padding",
    "the mask was made from ids that are never -100, or before padding",
    "mask response tokens only; pad labels with -100",
    "huggingface/trl#7024",
)
_add(
    "mask_covers_prompt",
    "The completion mask covers a part of the prompt",
    "the prompt's length was counted wrongly, or its mask was left out",
    "mask by the ids that were joined: False for the prompt's, True for the response's",
    "MakazhanAlpamys/Soup#682",
)
_add(
    "mask_too_short",
    "The completion mask leaves out response tokens",
    "the prompt's length was counted too long, or a template's tokens with it",
    "mask by the ids that were joined: False for the prompt's, True for the response's",
)
_add(
    "labels_differ",
    "The labels are not the tokens of the student's view",
    "labels were shifted although the selection shifts already, or are from other rows",
    "take labels from the same ids and the same mask as the logits",
)
_add(
    "no_end_token",
    "The end token is not learnt",
    "padding is masked by its id and the padding token is the end token, or every "
    "response was cut",
    "mask by length, not by id; append the end token to each response",
    "huggingface/trl#6357",
)
_add(
    "padding_in_response",
    "Responses hold end or padding tokens before their end",
    "padding was copied into the response, or two turns are taken for one",
    "cut padding off before the response joins another prompt",
    "modelscope/ms-swift#9145",
)
_add(
    "truncated_teacher_context",
    "The teacher does not read its whole context",
    "its prompts are cut to a length that was meant for the student's",
    "give the teacher a budget of its own (teacher_max_length)",
    "huggingface/trl#5862",
)
_add(
    "truncated_student_context",
    "The student does not read its whole simplified context",
    "its prompts are longer than its budget",
    "raise student_max_length, or simplify the context further",
)
_add(
    "teacher_reads_simplified_input",
    "The teacher reads the student's input, without the context",
    "one tensor of input ids serves both models",
    "give the teacher its own view; without it there is no context to distil",
)
_add(
    "student_reads_full_input",
    "The student reads the teacher's input, context included",
    "it is trained on D and will be used on the simplified D'",
    "give the student its own view, the one that it will be used with",
)
_add(
    "wrong_template",
    "A prompt is written in the other model's chat template",
    "one rendered text serves both models",
    "render each side with its own tokenizer's template",
    "thinking-machines-lab/tinker-cookbook#797",
)
_add(
    "retokenised_boundary",
    "Tokens merge across the join of prompt and response",
    "prompt and response were tokenised as one text",
    "tokenise them apart and join the ids",
    "huggingface/trl#5461",
)
_add(
    "not_the_example",
    "A row does not hold the tokens of its example",
    "rows, example numbers or tokenizers got mixed up",
    "build rows and numbers from one list, with the collator's own tokenizer",
)

# --- What the models read -------------------------------------------------------------

_add(
    "student_reads_other_input",
    "The student reads rows that are not the batch's",
    "the loss makes its own inputs: other padding, a packed row, another example",
    "examine the batch that the loss uses",
)
_add(
    "teacher_reads_other_input",
    "The teacher reads rows that are not the batch's",
    "the loss makes its own inputs for the teacher",
    "build both sides' inputs in one place, and prove that they fit",
)
_add(
    "attention_hides_tokens",
    "The attention mask hides tokens of the prompt or the response",
    "the mask was made by comparing ids with the padding token, which also stands in "
    "the text",
    "make the mask from lengths",
)

# --- The teacher ----------------------------------------------------------------------

_add(
    "teacher_in_train_mode",
    "The teacher answers the same question in two ways",
    "it is in train mode: its dropout is noise in the target",
    "call teacher.eval(), after anything that calls train() on what holds it",
)
_add(
    "teacher_gets_gradient",
    "The teacher is trained along",
    "its logits are not detached",
    "run it under torch.no_grad(), and keep its weights out of the optimiser",
)
_add(
    "teacher_unused",
    "The loss does not depend on the teacher",
    "its term is computed and not added, or its weight is 0",
    "add the soft term to the loss; a teacher that is not used need not be asked",
    "NousResearch/atropos#456",
)
_add(
    "teacher_moves_value_only",
    "The teacher moves the loss's value and not its gradient",
    "its log-probability stands beside the student's as a constant, as in k1, "
    "log p_s(y) - log p_t(y), back-propagated",
    "use k2, the score function, or the divergence over the whole vocabulary",
    "verl refuses it: its gradient does not depend on the teacher",
)
_add(
    "unexpected_start",
    "The teacher does not expect an answer where the response begins",
    "its prompt ends at another place of the template: no generation prompt, or before "
    "or after the mark of a thinking block",
    "end the teacher's prompt where its own answers begin",
    "siyan-zhao/OPSD#10",
)
_add(
    "padded_columns_have_mass",
    "The teacher gives probability to columns that are no tokens",
    "its output head is padded, and the columns beyond the tokenizer hold anything",
    "cut both sides' logits to the tokenizer's length before the softmax",
)
_add(
    "teacher_mass_low",
    "The sparse targets name too little of the teacher's probability",
    "k is small for this teacher or this temperature",
    "raise k, or draw the targets at random, which has no bias",
)
_add(
    "top_k_renormalised",
    "The loss is blind to the mass outside the teacher's top k",
    "both sides are renormalised on the top k",
    'keep the rest as one more event: tail="bucket"',
    "ms-swift, NVIDIA ModelOpt, axolotl",
)
_add(
    "top_k_tail_cut",
    "The sum over the top k is cut off, and is no divergence",
    "the rest of the distribution is left out without a bucket for it: the student "
    "gets surer than its teacher",
    'keep the rest as one more event: tail="bucket"',
    "verl-project/verl#7856, #5041",
)

# --- Positions ------------------------------------------------------------------------

_add(
    "no_gradient",
    "No gradient reaches the student",
    "the student runs without gradient, or the teacher's logits stand on both sides",
    "check which logits go into the loss, and that no detach or no_grad cuts them off",
    "labmlai/annotated_deep_learning_paper_implementations#66",
)
_add(
    "label_shift",
    "The gradient is one position late",
    "the mask of the response is put on logits that are not shifted: position t "
    "predicts token t + 1",
    "pair logits[:, :-1] with labels[:, 1:] (View.select)",
    "arcee-ai/DistillKit",
)
_add(
    "labels_shifted_twice",
    "The gradient is one position early",
    "labels are shifted, and shifted again inside the model or the loss",
    "shift in one place (View.select)",
)
_add(
    "first_token_dropped",
    "The first response token is not learnt",
    "logits are taken at the response's own positions, where the last prompt position "
    "is not among them",
    "begin at the last position of the prompt",
    "TRL's ULD loss, with the end token dropped as well",
)
_add(
    "end_token_dropped",
    "The last response token is not learnt, so no answer will end",
    "the end token is taken for padding, or dropped on purpose",
    "keep the end token in the mask",
    "huggingface/trl#6357",
)
_add(
    "tokens_without_gradient",
    "Some response tokens get no gradient",
    "a clamp, a threshold or a length limit cuts them off",
    "look at what these tokens have in common; a sum over the top k that is clamped at "
    "0 stops where the student is too sure",
    "verl-project/verl#7856",
)
_add(
    "prompt_in_loss",
    "Prompt tokens are in the loss",
    "the loss has no mask, or one of attention and not of the response",
    "select the response's positions before the mean",
    "MakazhanAlpamys/Soup#682",
)
_add(
    "padding_in_loss",
    "Padding is in the loss",
    "the mask is always true, or that of another tensor",
    "select the response's positions before the mean",
    "huggingface/trl#7024, linkedin/Liger-Kernel#974",
)

# --- Scale ----------------------------------------------------------------------------

_add(
    "t2_missing",
    "The soft term is T^2 times too small",
    "the factor T^2 is declared and left out",
    "multiply the soft term by T^2, or declare scale_by_t2=False",
    "TropComplique/knowledge-distillation-keras#2, keras-team/keras-io#869",
)
_add(
    "t_for_t2",
    "The soft term is T times too small",
    "it is multiplied by T, not by T^2",
    "multiply the soft term by T^2",
)
_add(
    "t2_squared",
    "The soft term is T^2 times too large",
    "T^2 is applied twice, in the divergence and by its caller",
    "apply T^2 in one place",
)
_add(
    "t2_undeclared",
    "The soft term is T^2 times larger than declared",
    "the loss multiplies by T^2 although scale_by_t2 is False",
    "declare scale_by_t2=True, or drop the factor",
)
_add(
    "mean_over_vocabulary",
    "The gradient is smaller by the size of the vocabulary",
    "torch's reduction='mean' divides by tokens times V",
    "sum over the vocabulary, then take the mean over tokens",
    "haitongli/knowledge-distillation-pytorch#2, NVIDIA ModelOpt, huggingface/trl#4105",
)
_add(
    "padding_in_denominator",
    "The mean counts positions that are not in the loss",
    "the masked sum is divided by all positions: padding and prompts dilute it",
    "divide by the number of response tokens",
    "huggingface/trl#7024",
)
_add(
    "divided_by_rows",
    "The sum over tokens is divided by the number of rows",
    "reduction='batchmean' on a tensor [B, T, V] divides by B",
    "select the response tokens first, [N, V], or divide by their number",
)
_add(
    "sum_for_mean",
    "The loss is a sum where a mean is declared",
    "reduction='sum', without the division by the count",
    "divide by the number of response tokens of the whole step",
)
_add(
    "micro_batches_added",
    "The loss grows with the number of micro-batches",
    "each micro-batch is divided by its own count, and their means are added",
    "divide every micro-batch by the count of the whole step (num_items)",
    "MakazhanAlpamys/Soup#720",
)
_add(
    "wrong_sign",
    "The loss pushes the student away from its teacher",
    "a log-likelihood is minimised without its minus sign",
    "minimise -log p, or the divergence itself",
)
_add(
    "wrong_scale",
    "The gradient has the right direction and another length",
    "a weight, a count or a world size stands in the loss that is not declared",
    "look for the factor; with AdamW it moves clipping, and the mix with other terms",
)

# --- Another loss ---------------------------------------------------------------------

_add(
    "sequence_mean_for_token_mean",
    "Tokens of short responses weigh more than those of long ones",
    "the means of rows are averaged where a token mean is declared",
    "sum over all tokens and divide once",
    "pytorch/torchtune#1865",
)
_add(
    "token_mean_for_sequence_mean",
    "Long responses weigh more than short ones",
    "tokens are averaged where a mean over sequences is declared",
    "take each row's mean first",
)
_add(
    "micro_batch_means",
    "Tokens of short micro-batches weigh more",
    "each micro-batch is divided by its own count, and their means are averaged",
    "divide every micro-batch by the count of the whole step (num_items)",
    "huggingface/trl#4719, modelscope/ms-swift#10165",
)
_add(
    "hard_weight_swapped",
    "The weights of soft and hard term are swapped",
    "alpha is the soft term's weight in one library and the hard term's in another",
    "hard_weight is that of the labels",
)
_add(
    "hard_weight_ignored",
    "The hard labels have no weight",
    "the cross-entropy is computed and not added",
    "add it, or declare hard_weight=0",
)
_add(
    "hard_labels_softened",
    "The cross-entropy with the labels is taken at temperature T",
    "logits are divided by T before both terms",
    "divide by T in the soft term alone",
)
_add(
    "t2_on_hard_labels",
    "T^2 multiplies the hard labels as well",
    "the whole loss is multiplied by T^2",
    "multiply the soft term alone",
)
_add(
    "direction_swapped",
    "The two distributions are swapped in the divergence",
    "kl_div(input, target) takes the student's log-probabilities first, and KL(p || q) "
    "the teacher first",
    "forward KL is sum p_t (log p_t - log p_s)",
    "paiml/aprender#2153",
)
_add(
    "another_divergence",
    "It is the gradient of another divergence",
    "a default, or a knob that does not do what its name says",
    "name the divergence that is meant; the interior of the generalised JSD is no "
    "mixture of the two KLs",
    "huggingface/trl#5731, modelscope/ms-swift#10078",
)
_add(
    "temperature_on_one_side",
    "Only one of the two sides is softened",
    "one of the two logits is not divided by T",
    "divide both by T",
)
_add(
    "temperature_ignored",
    "The temperature is ignored",
    "it is used for sampling alone, or not passed on",
    "pass the temperature to the loss",
    "huggingface/trl#6847",
)
_add(
    "probabilities_for_logs",
    "The cross-entropy lacks its logarithm",
    "softmax in the place of log_softmax",
    "use log_softmax for the student",
    "microsoft/ProDA#20",
)
_add(
    "clamped_log_probs",
    "Tokens that the student rules out get no gradient",
    "log-probabilities are clamped from below",
    "leave log_softmax as it is: it does not overflow",
    "verl's log_prob_min_clamp",
)
_add(
    "softmax_twice",
    "A side goes through the softmax twice",
    "probabilities are passed where logits are expected",
    "pass logits",
)
_add(
    "argmax_for_distribution",
    "The targets are the teacher's likeliest tokens, not its distribution",
    "hard labels by the teacher stand where soft ones are declared",
    "use the teacher's whole distribution",
)
_add(
    "teacher_shifted",
    "Student's and teacher's logits are of different positions",
    "one slice serves both, although prompts differ in length, or one side is shifted",
    "select each side with its own mask (View.select)",
    "siyan-zhao/OPSD#10",
)
_add(
    "vocabulary_padded",
    "Columns that only one model has are in the softmax",
    "the narrower head is filled up with a logit",
    "cut both to the narrower one",
    "Liger-Kernel fills up with 0, ms-swift with the other model's logits",
)
_add(
    "sampled_token_only",
    "Only the response token's own log-probability is learnt",
    "an estimate from one token stands where the whole divergence is declared",
    "sum over the vocabulary, or declare the divergence that the estimate is of",
)
_add(
    "k3_gradient",
    "k3 is back-propagated",
    "its value estimates reverse KL; its gradient, over tokens of the student, is that "
    "of forward KL",
    "use k2 or the score function for reverse KL",
    "verl's documentation recommends it; torchrl#4038 has the same form",
)
_add(
    "low_precision",
    "The gradient has too few digits",
    "log-probabilities are computed in 16 bits",
    "convert logits to float32 before log_softmax",
    "Liger-Kernel's chunked JSD works in the logits' dtype",
)
_add(
    "unexplained_gradient",
    "The gradient is not that of the declared objective",
    "unknown",
    "compare the loss with the closed form token by token, on one row",
)
_add(
    "loss_not_finite",
    "The loss is not a finite number",
    "exp followed by log, 0 times -inf, or a step that was too large",
    "use log_softmax throughout; lower the learning rate",
    "linkedin/Liger-Kernel#769",
)
